"""`lateral_connection` with the weight kept in shared memory: a third kernel, for Hopper, beside `connect`.

The same sums in the schedule of `stationary_kernels.py`.  `connect` moves 5.2 TB/s through L2 at C2 on an H100, where
memory moves 1.6: each of its 1,000 tiles fetches the weight anew.  Here a program fetches it once, and copies, products
and epilogues run beside each other in groups of warps of their own.

It serves NHWC maps in 16 bits whose coarser map, if any, has half their size, on compute capability 9.0.  It was
emulated and compiled, and has not run on a GPU yet: FPN_KERNELS_AUTOTUNE=all measures it and takes it where it is
faster, nothing else does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from fpn_kernels.backends.triton import geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant
from fpn_kernels.backends.triton.descriptor_convolution import scratch

# What a block may have on Hopper (227 KB, 1 KB of it reserved), less barriers and what the groups of warps are told.
_SHARED_BYTES = 226 * 1024 - 1536
_GROUPS = 2  # stationary_kernels.GROUPS, which is not imported without need
_MOST_STAGES, _FEWEST_STAGES = 8, 4


@dataclasses.dataclass(frozen=True)
class StationaryConfig:
    """A tile, a box of pixels by output channels, and the input channels of a chunk.

    Attributes:
        rows, columns: the box, 64 pixels: as many as a group of four warps has rows of a product.
        channels: output channels of a program.
        depth: input channels of a chunk; all of `channels`, or half of them.
    """

    rows: int
    columns: int
    channels: int
    depth: int

    def chunks(self, in_channels: int) -> int:
        return -(-in_channels // self.depth)

    def stages(self, in_channels: int, has_top: bool) -> int:
        """How many chunks of pixels fit beside the weight and the coarse pixels."""
        pixels, element = self.rows * self.columns, 2
        weight = self.chunks(in_channels) * self.depth * self.channels * element
        tops = _GROUPS * pixels // 4 * self.channels * element if has_top else 0
        return min(_MOST_STAGES, (_SHARED_BYTES - weight - tops) // (pixels * self.depth * element))

    def fits(self, in_channels: int, out_channels: int, has_top: bool) -> bool:
        # The result takes the slots of the tile's own last chunks, as many as it is deep.
        holds_result = self.chunks(in_channels) >= self.channels // self.depth
        worth = out_channels > self.channels // 2
        return holds_result and worth and self.stages(in_channels, has_top) >= _FEWEST_STAGES

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.channels}x{self.depth}"


# By the paper's levels: all 256 channels of C2's weight fit (128 KB), half of C3's, a quarter of C4's.  With 8 x 16
# pixels by 128 channels in chunks of 64, 18 instructions went to and from local memory (compiled).
TABLE = {
    "large": StationaryConfig(4, 16, 256, 128),
    "medium": StationaryConfig(4, 16, 128, 128),
    "small": StationaryConfig(4, 16, 64, 64),
}


@functools.cache
def _kernels() -> Any:
    """The module of the kernel; None where this Triton's Gluon, which is experimental, lacks what it imports."""
    try:
        return importlib.import_module("fpn_kernels.backends.triton.stationary_kernels")
    except (ImportError, AttributeError):
        return None


def candidates(in_channels: int, out_channels: int, has_top: bool) -> list[StationaryConfig]:
    """The tiles that fit a call, largest first."""
    if _kernels() is None:
        return []
    return [config for config in TABLE.values() if config.fits(in_channels, out_channels, has_top)]


def plan(
    config: StationaryConfig,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    link: launching.Link = launching.ALONE,
) -> Callable[..., Sequence[Tensor]]:
    """`lateral_connection.plan` by a tile of this table; `weight` is [Cout, Cin]."""
    batch, in_channels, height, width = feature.shape
    out_channels = weight.shape[0]
    tiles_y, tiles_x = -(-height // config.rows), -(-width // config.columns)
    tiles, channel_tiles = batch * tiles_y * tiles_x, -(-out_channels // config.channels)
    # As many programs as multiprocessors, and as many for each tile of channels.
    programs = min(max(1, geometry.processors(feature) // channel_tiles), tiles)
    coarse = out if top is None else top
    turned = not geometry.rows_are_aligned(weight)
    connect = launching.Launch(
        _kernels().connect,
        (programs * channel_tiles,),
        (
            *(batch, in_channels, out_channels, height, width, *coarse.shape[2:]),
            *_steps(feature),
            weight.stride(1) if turned else weight.stride(0),
            *_steps(coarse),
            *_steps(out),
            *(tiles, tiles_y, tiles_x, channel_tiles),
        ),
        {
            **_constants(config, in_channels, turned, bias is not None, top is not None),
            **link.constants(),
            "num_warps": 4,
        },
        feature,
    )

    def run(
        feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor, gain: float
    ) -> Sequence[Tensor]:
        with scratch(feature.device) as used:
            connect(feature, weight, out if bias is None else bias, out if top is None else top, out, gain)
        return tuple(used)

    return run


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """The strides of a dense NHWC map's images, rows and pixels; TMA wants none to be 0, whatever is of size 1."""
    channels, height, width = tensor.shape[1:]
    n, _, y, x = geometry.strides(tensor)
    x = x or channels
    y = y or width * x
    return n or height * y, y, x


def _constants(config: StationaryConfig, in_channels: int, turned: bool, bias: bool, has_top: bool) -> dict[str, Any]:
    tile = {"ROWS": config.rows, "COLUMNS": config.columns, "CHANNELS": config.channels, "DEPTH": config.depth}
    ring = {"CHUNKS": config.chunks(in_channels), "STAGES": config.stages(in_channels, has_top)}
    return {"TURNED": turned, "BIAS": bias, "HAS_TOP": has_top, **tile, **ring}


def connect_variant(
    size: str,
    in_channels: int,
    has_top: bool,
    operator: str,
    link: launching.Link = launching.ALONE,
    turned: bool = False,
) -> Variant:
    """Describes one compilation of `stationary_kernels.connect`, on aligned tensors; the adjoint has no bias."""
    kernels, config = _kernels(), TABLE[size]
    links = {"FOLLOWS": link.follows, "LEADS": link.leads}
    constexprs = {**_constants(config, in_channels, turned, not turned, has_top), **links}
    kinds = {
        **dict.fromkeys(kernels.POINTERS, POINTER_TYPES[2]),
        **{"gain": "fp32"},
        **dict.fromkeys(constexprs, "constexpr"),
    }
    arguments = kernels.connect.arg_names
    return Variant(
        kernels.connect,
        {name: kinds.get(name, "i32") for name in arguments},
        constexprs,
        {(arguments.index(name),): [["tt.divisibility", 16]] for name in kernels.POINTERS},
        {"num_warps": 4},
        f"{operator}-{'merged' if has_top else 'alone'}-{in_channels}to{config}",
        matrix_product=True,
        descriptors=True,
        link=link,
        capabilities=(90,),
    )


def variants() -> Iterator[Variant]:
    """What a launch compiles for the paper's levels, with a coarser map and alone; and in a pathway."""
    if _kernels() is None:
        return
    chained = launching.Link(follows=True, leads=True)
    yield connect_variant("large", 256, True, "lateral_connection_stationary-chained", chained)
    yield connect_variant("medium", 512, True, "lateral_connection_stationary-chained", chained)
    for size, in_channels in (("large", 256), ("medium", 256), ("medium", 512), ("small", 512), ("small", 1024)):
        for has_top in (True, False):
            yield connect_variant(size, in_channels, has_top, "lateral_connection_stationary")
    for size in TABLE:
        yield connect_variant(size, 256, False, "lateral_connection_stationary-adjoint", turned=True)
