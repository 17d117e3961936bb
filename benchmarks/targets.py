"""The targets per GPU: times on the device, and ratios of such times.

A time is possible by the arithmetic of `fpn_kernels/roofline.py` at the rates measured on that GPU; a comment has the
floor's share of it. H200 (sm_90, 132 SMs, 60 MB of L2): a copy of 4.3 TB/s, a bf16 product of 790 TFLOP/s. H100 (50 MB
of L2): 3.0 TB/s and 798 TFLOP/s, the same shares of its floors and the same ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Target:
    """The targets of one row; level None is all levels.

    Attributes:
        seconds: the longest time on the device.
        eager, compiled: the least ratio of the time of eager, and of torch.compile max-autotune, to the library's.
    """

    operator: str
    direction: str
    level: int | None
    batch: int
    seconds: float | None
    eager: float | None
    compiled: float | None
    dtype: str = "bf16"
    layout: str = "NHWC"

    def text(self) -> str:
        parts = []
        if self.seconds is not None:
            short = self.seconds < 1e-3
            parts.append(f"<= {self.seconds * 1e6:g} us" if short else f"<= {self.seconds * 1e3:g} ms")
        parts += [f">= {self.eager:g}x eager"] if self.eager is not None else []
        parts += [f">= {self.compiled:g}x compile"] if self.compiled is not None else []
        return ", ".join(parts)


# Operator, level, batch; seconds on an H200 and an H100; ratios. A row bound by operations takes as long on both.
_FORWARD = (
    ("upsample_add", 2, 1, 19.5e-6, 28e-6, 3.0, 1.0),  # 88 %
    ("upsample_add", None, 8, 195e-6, 280e-6, 3.0, 1.0),  # 92 %
    ("lateral_connection", 2, 1, 21e-6, 30e-6, 4.0, 1.3),  # 82 %
    ("lateral_connection", None, 8, 255e-6, 365e-6, 4.0, 1.3),  # 86 %
    ("output_conv", 2, 1, 115e-6, 115e-6, 1.1, 1.05),  # 83 %
    ("output_conv", None, 1, 165e-6, 165e-6, 1.1, 1.05),  # 77 %
    ("output_conv", 2, 8, 900e-6, 900e-6, 1.1, 1.05),  # 85 %
    ("top_down_pathway", None, 1, 34e-6, 49e-6, 5.0, 1.5),  # 72 %
    ("top_down_pathway", None, 8, 230e-6, 330e-6, 5.0, 1.5),  # 85 %
    ("neck", None, 1, 205e-6, 220e-6, 1.6, 1.2),
    ("neck", None, 8, 1.35e-3, 1.45e-3, 1.6, 1.2),
)


def _targets(gpu: int) -> tuple[Target, ...]:
    """Of one GPU; with NCHW maps the ratio to eager alone."""
    rows = [Target(row[0], "forward", row[1], row[2], (row[3], row[4])[gpu], row[5], row[6]) for row in _FORWARD]
    rows += [Target("neck", "forward+backward", None, batch, None, 1.4, 1.15) for batch in (1, 8)]
    return (*rows, *(replace(row, layout="NCHW", seconds=None, compiled=None) for row in rows))


# By `torch.cuda.get_device_name`.
TARGETS = {"NVIDIA H200": _targets(0), "NVIDIA H100 80GB HBM3": _targets(1)}
