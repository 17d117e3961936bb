"""What is to be reached on each GPU: times of the device, and ratios of device times.

A time is possible by the arithmetic of `fpn_kernels/roofline.py` at the rates measured on that GPU; the share of the
floor that it stands for is noted beside it. A GPU that is not named here has no targets.

H200 (sm_90, 132 multiprocessors, 60 MB of L2), floors at a copy of 4.3 TB/s and a bf16 product of 790 TFLOP/s.
H100 (the same, 50 MB of L2), at 3.0 TB/s and 798 TFLOP/s: the same shares of its floors (the neck: what its pathway
takes longer is added), and the same ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases import FORWARD, TRAINING


@dataclass(frozen=True)
class Target:
    """One row's targets.

    Attributes:
        operator, direction, level, batch, dtype, layout: the row; level None is all of them.
        seconds: the time on the device is to be at most this.
        eager, compiled: eager's time, and torch.compile max-autotune's, over the library's are to be at least this.
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
        parts = [f"<= {_time(self.seconds)}"] if self.seconds is not None else []
        parts += [f">= {self.eager:g}x eager"] if self.eager is not None else []
        parts += [f">= {self.compiled:g}x compile"] if self.compiled is not None else []
        return ", ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:g} us" if seconds < 1e-3 else f"{seconds * 1e3:g} ms"


_H200 = (
    # operator, direction, level, batch, seconds at most, x eager and x max-autotune at least; floor, share of it
    Target("upsample_add", FORWARD, 2, 1, 19.5e-6, 3.0, 1.0),  # 17.2 us, 88 %
    Target("upsample_add", FORWARD, None, 8, 195e-6, 3.0, 1.0),  # 180 us, 92 %
    Target("lateral_connection", FORWARD, 2, 1, 21e-6, 4.0, 1.3),  # 17.2 us, 82 %
    Target("lateral_connection", FORWARD, None, 8, 255e-6, 4.0, 1.3),  # 219 us, 86 %
    Target("output_conv", FORWARD, 2, 1, 115e-6, 1.1, 1.05),  # 96 us, 83 %
    Target("output_conv", FORWARD, None, 1, 165e-6, 1.1, 1.05),  # 127 us, 77 %
    Target("output_conv", FORWARD, 2, 8, 900e-6, 1.1, 1.05),  # 765 us, 85 %
    Target("top_down_pathway", FORWARD, None, 1, 34e-6, 5.0, 1.5),  # 24.4 us, 72 %
    Target("top_down_pathway", FORWARD, None, 8, 230e-6, 5.0, 1.5),  # 195 us, 85 %
    Target("neck", FORWARD, None, 1, 205e-6, 1.6, 1.2),
    Target("neck", FORWARD, None, 8, 1.35e-3, 1.6, 1.2),
    Target("neck", TRAINING, None, 1, None, 1.4, 1.15),
    Target("neck", TRAINING, None, 8, None, 1.4, 1.15),
)

# In the order of the rows above; what multiplies more than it moves takes as long on both.
_H100_SECONDS = (
    *(28e-6, 280e-6, 30e-6, 365e-6, 115e-6, 165e-6, 900e-6),
    *(49e-6, 330e-6, 220e-6, 1.45e-3, None, None),
)
_H100 = tuple(replace(target, seconds=seconds) for target, seconds in zip(_H200, _H100_SECONDS, strict=True))


def _nchw(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """NCHW inputs are to be as far ahead of NCHW eager; their times have no target."""
    return tuple(replace(target, layout="NCHW", seconds=None, compiled=None) for target in targets)


# By the name that `torch.cuda.get_device_name` gives.
TARGETS: dict[str, tuple[Target, ...]] = {
    "NVIDIA H200": (*_H200, *_nchw(_H200)),
    "NVIDIA H100 80GB HBM3": (*_H100, *_nchw(_H100)),
}
