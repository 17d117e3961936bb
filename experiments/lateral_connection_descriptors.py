"""`lateral_connection` over tensor descriptors: a second kernel beside `lateral_connection.connect`.

The same sums in another schedule (`descriptor_kernels.py`): operands by bulk tensor copies, persistent programs, the
loads of the next tile issued before the epilogue of this one, which matters where the sum is as short as 256 channels.
An NCHW feature is read in place (16-bit tensor cores take both operand orders).  At ratio 2 a tile's coarse pixels are
one box as well, read once and broadcast; at any other ratio they are gathered by their addresses.

On an H100 it was never clearly ahead in 16 bits and NHWC; `lateral_connection.DESCRIPTORS` says where it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fpn_kernels.backends.triton.compiled import Variant
from fpn_kernels.backends.triton.descriptor_convolution import (
    MOST_SCATTERED,
    BoxConfig,
    Level,
    boxed,
    convolve_variant,
    filling,
    fitting,
)
from fpn_kernels.backends.triton.descriptor_convolution import plan as plan_levels
from torch import Tensor

from fpn_kernels.gpu import geometry, launch

# (arithmetic, size of the tile) -> tile.  The large one has all 256 channels of the paper's maps, so that a feature is
# read once.  Its epilogue takes them in two parts: in one, coarse pixels hardly fit (compiled for sm_90: with a box
# 229,416 bytes of shared memory, in two parts 188,456; gathered 238 registers, in two parts 196).
TABLE = {
    ("half", "large"): BoxConfig(8, 16, 256, 64, 8, 3, parts=2),
    ("half", "medium"): BoxConfig(8, 16, 128, 64, 8, 3),
    ("half", "small"): BoxConfig(8, 16, 64, 64, 4, 3, resident=2),
    ("tf32", "large"): BoxConfig(8, 16, 128, 32, 8, 3),
    ("tf32", "small"): BoxConfig(8, 8, 64, 32, 4, 3, resident=2),
    ("ieee", "large"): BoxConfig(4, 16, 64, 16, 4, 3, resident=2),
    ("ieee", "small"): BoxConfig(4, 8, 32, 16, 4, 3, resident=4),
}


def candidates(arithmetic: str, out: Tensor) -> list[BoxConfig]:
    """The tiles that fit a call, largest first."""
    return fitting(TABLE, arithmetic, out.shape[1], boxed([out]))


def choose(arithmetic: str, out: Tensor, processors: int) -> BoxConfig:
    """The largest tile of which there are as many as multiprocessors."""
    sizes = [(out.shape[2], out.shape[3])]
    return filling(candidates(arithmetic, out), out.shape[0], out.shape[1], sizes, processors)


def plan(
    config: BoxConfig,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str,
    link: launch.Link = launch.ALONE,
) -> Callable[..., Sequence[Tensor]]:
    """`lateral_connection.plan` by a box of this table; `weight` is [Cout, Cin]."""
    level = Level(feature, weight, bias, top, out)
    convolve = plan_levels([level], config, 1, geometry.arithmetic_of(feature), mode, link)

    def run(
        feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor, gain: float
    ) -> Sequence[Tensor]:
        return convolve([feature], [weight], [bias], [out], top, gain)

    return run


def variants() -> Iterator[Variant]:
    """What a launch may compile: every tile in each layout, with a coarse box, with a gathered one, and alone."""
    for (arithmetic, _), config in TABLE.items():
        element_size = 2 if arithmetic == "half" else 4
        for layout, axis in (("nhwc", "channels"), ("nchw", "pixels")):
            name = f"lateral_connection_descriptors-{layout}"
            # What `top_reading` says of a narrow box.
            wide = axis == "channels" or config.columns // 2 * element_size >= 16
            for reading, top in (("box", axis), ("gather", "gather")) if wide else (("gather", "gather"),):
                yield convolve_variant(
                    *(config, f"{name}-{reading}"), arithmetic=arithmetic, taps=1, feature=axis, top=top, out=axis
                )
        name = "lateral_connection_descriptors-nchw-to-nhwc"
        yield convolve_variant(config, name, arithmetic=arithmetic, taps=1, feature="pixels")
        if config.channels <= MOST_SCATTERED:
            name = "lateral_connection_descriptors-nhwc-to-nchw-scattered"
            yield convolve_variant(
                *(config, name), arithmetic=arithmetic, taps=1, top="gather", out="pixels", boxed=False
            )
