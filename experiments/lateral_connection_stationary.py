"""`lateral_connection` with the weight kept in shared memory: a third kernel, for Hopper, beside `connect`.

The same sums in the schedule of `stationary_kernels.py`.  `connect` moves 5.2 TB/s through L2 at C2 on an H100, where
memory moves 1.6: each of its 1,000 tiles fetches the weight anew.  Here a program fetches it once, and copies, products
and epilogues run beside each other in groups of warps of their own.

It serves 16-bit maps on compute capability 9.0: NHWC with a coarser map of half the size, or none, in tiles that are
boxes of pixels; NCHW, and NHWC with any coarser map, by its twin (`stationary_flat_kernels.py`).  Both were emulated
and compiled, and have not run on a GPU yet: FPN_KERNELS_AUTOTUNE=all measures them and takes them where they are
faster, nothing else does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.descriptor_convolution import scratch
from torch import Tensor

from fpn_kernels.gpu import availability, geometry, launch

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
        flat: the pixels of a tile are those of an image one after the other, and its coarser ones are gathered.
    """

    rows: int
    columns: int
    channels: int
    depth: int
    flat: bool = False

    def chunks(self, in_channels: int) -> int:
        return -(-in_channels // self.depth)

    def stages(self, in_channels: int, has_top: bool) -> int:
        """How many chunks of pixels fit beside the weight and the coarse pixels."""
        pixels, element = self.rows * self.columns, 2
        weight = self.chunks(in_channels) * self.depth * self.channels * element
        tops = _GROUPS * pixels // 4 * self.channels * element if has_top and not self.flat else 0
        return min(_MOST_STAGES, (_SHARED_BYTES - weight - tops) // (pixels * self.depth * element))

    def fits(self, in_channels: int, out_channels: int, has_top: bool) -> bool:
        # The result takes the slots of the tile's own last chunks, as many as it is deep.
        holds_result = self.chunks(in_channels) >= self.channels // self.depth
        worth = out_channels > self.channels // 2
        if self.flat and has_top:
            worth = out_channels % self.channels == 0  # coarse pixels are gathered unmasked
        return holds_result and worth and self.stages(in_channels, has_top) >= _FEWEST_STAGES

    def __str__(self) -> str:
        return f"{'flat' if self.flat else self.rows}x{self.columns}x{self.channels}x{self.depth}"


# By the paper's levels: all 256 channels of C2's weight fit (128 KB), half of C3's, a quarter of C4's.  With 8 x 16
# pixels by 128 channels in chunks of 64, 18 instructions went to and from local memory (compiled).
TABLE = {
    "large": StationaryConfig(4, 16, 256, 128),
    "medium": StationaryConfig(4, 16, 128, 128),
    "small": StationaryConfig(4, 16, 64, 64),
}

# The axis of the result, and the size.  The large one is for calls without a coarser map: with one, 45 instructions go
# to and from local memory, and so they do in NCHW with 128 pixels, or by 128 channels in 8 chunks (4 of them).
FLAT_TABLE = {
    ("channels", "large"): StationaryConfig(1, 64, 256, 128, flat=True),
    ("channels", "medium"): StationaryConfig(1, 64, 128, 128, flat=True),
    ("channels", "small"): StationaryConfig(1, 64, 64, 64, flat=True),
    ("pixels", "medium"): StationaryConfig(1, 64, 128, 64, flat=True),
    ("pixels", "small"): StationaryConfig(1, 64, 64, 64, flat=True),
}
_MOST_CHUNKS_OF_PIXELS = 4


@functools.cache
def _kernels(flat: bool) -> Any:
    """The module of the kernel; None where this Triton's Gluon, which is experimental, lacks what it imports."""
    name = "stationary_flat_kernels" if flat else "stationary_kernels"
    try:
        return importlib.import_module(f"fpn_kernels.backends.triton.{name}")
    except (ImportError, AttributeError):
        return None


def candidates(
    feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor
) -> list[StationaryConfig]:
    """The tiles that fit a call, largest first."""
    call = (feature, weight, bias, top, out)
    if availability.lateral_connection_stationary(*call) is None:
        table = list(TABLE.values())
    elif availability.lateral_connection_stationary_flat(*call) is None:
        table = flat_tiles(geometry.flat_axis(out), weight.shape[1], top is not None)
    else:
        return []
    if _kernels(table[0].flat) is None:
        return []
    return [config for config in table if config.fits(weight.shape[1], weight.shape[0], top is not None)]


def flat_tiles(axis: str | None, in_channels: int, has_top: bool) -> list[StationaryConfig]:
    """Those of an axis of the result that do not spill."""
    tiles = {size: config for (along, size), config in FLAT_TABLE.items() if along == axis}
    if axis == "pixels" and tiles["medium"].chunks(in_channels) > _MOST_CHUNKS_OF_PIXELS:
        del tiles["medium"]
    if axis == "channels" and has_top:
        del tiles["large"]
    return list(tiles.values())


def plan(
    config: StationaryConfig,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str,
    link: launch.Link = launch.ALONE,
) -> Callable[..., Sequence[Tensor]]:
    """`lateral_connection.plan` by a tile of these tables; `weight` is [Cout, Cin]."""
    assert config.flat or top is not None or not link.follows, "what loads the coarser map waits for the launch before"
    in_channels, out_channels = feature.shape[1], weight.shape[0]
    tiles, numbers = (_flat_numbers if config.flat else _numbers)(config, feature, weight, top, out)
    channel_tiles = -(-out_channels // config.channels)
    # As many programs as multiprocessors, and as many for each tile of channels.
    programs = min(max(1, geometry.processors(feature) // channel_tiles), tiles)
    connect = launch.Launch(
        _kernels(config.flat).connect,
        (programs * channel_tiles,),
        (*numbers, channel_tiles),
        {
            **_constants(config, in_channels, not geometry.rows_are_aligned(weight), bias is not None, top is not None),
            **(_flat_constants(feature, top, out, mode) if config.flat else {}),
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


def _row(weight: Tensor) -> int:
    """The stride of the matrix's rows, or of its columns where those are contiguous."""
    return weight.stride(0) if geometry.rows_are_aligned(weight) else weight.stride(1)


def _numbers(
    config: StationaryConfig, feature: Tensor, weight: Tensor, top: Tensor | None, out: Tensor
) -> tuple[int, tuple[Any, ...]]:
    """How many tiles of pixels there are, and the numbers of a launch."""
    batch, in_channels, height, width = feature.shape
    tiles_y, tiles_x = -(-height // config.rows), -(-width // config.columns)
    tiles, coarse = batch * tiles_y * tiles_x, out if top is None else top
    sizes = (batch, in_channels, weight.shape[0], height, width, *coarse.shape[2:])
    return tiles, (
        *(*sizes, *_steps(feature), _row(weight), *_steps(coarse), *_steps(out)),
        *(tiles, tiles_y, tiles_x),
    )


def _flat_numbers(
    config: StationaryConfig, feature: Tensor, weight: Tensor, top: Tensor | None, out: Tensor
) -> tuple[int, tuple[Any, ...]]:
    batch, in_channels, height, width = feature.shape
    pixels = height * width
    tiles_of_image, coarse = -(-pixels // config.columns), out if top is None else top
    sizes = (batch, in_channels, weight.shape[0], pixels, width, *coarse.shape[2:])
    scales = (geometry.scale(coarse.shape[2], height), geometry.scale(coarse.shape[3], width))
    steps = (*_flat_steps(feature), _row(weight), *geometry.strides(coarse), *_flat_steps(out))
    return batch * tiles_of_image, (*scales, *sizes, *steps, batch * tiles_of_image, tiles_of_image)


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """The strides of a dense NHWC map's images, rows and pixels; TMA wants none to be 0, whatever is of size 1."""
    channels, height, width = tensor.shape[1:]
    n, _, y, x = geometry.strides(tensor)
    x = x or channels
    y = y or width * x
    return n or height * y, y, x


def _flat_steps(tensor: Tensor) -> tuple[int, int]:
    """The strides of a map's images and of what is not contiguous, its pixels or its channels."""
    channels, dim = tensor.shape[1], 2 if geometry.flat_axis(tensor) == "channels" else 1
    flat = tensor.flatten(2)
    n, row = geometry.strides(flat)[0], geometry.strides(flat)[dim] or flat.shape[3 - dim]
    return n or channels * flat.shape[2], row


def _flat_constants(feature: Tensor, top: Tensor | None, out: Tensor, mode: str) -> dict[str, Any]:
    axis = geometry.flat_axis(out)
    doubled = axis == "pixels" and top is not None
    return {"FEATURE": geometry.flat_axis(feature), "OUT": axis, "MODE": mode, "DOUBLED": doubled}


def _constants(config: StationaryConfig, in_channels: int, turned: bool, bias: bool, has_top: bool) -> dict[str, Any]:
    box = {"PIXELS": config.columns} if config.flat else {"ROWS": config.rows, "COLUMNS": config.columns}
    tile = {**box, "CHANNELS": config.channels, "DEPTH": config.depth}
    ring = {"CHUNKS": config.chunks(in_channels), "STAGES": config.stages(in_channels, has_top)}
    return {"TURNED": turned, "BIAS": bias, "HAS_TOP": has_top, **tile, **ring}


def _variant(
    config: StationaryConfig,
    in_channels: int,
    has_top: bool,
    description: str,
    link: launch.Link = launch.ALONE,
    turned: bool = False,
    **flat: Any,
) -> Variant:
    """Describes one compilation of a kernel, on aligned tensors; the adjoint (`turned`) has no bias."""
    kernels = _kernels(config.flat)
    constexprs = {
        **_constants(config, in_channels, turned, not turned, has_top),
        **{"FOLLOWS": link.follows, "LEADS": link.leads},
        **flat,
    }
    described = variant(
        *(kernels.connect, dict.fromkeys(kernels.POINTERS, POINTER_TYPES[2]), ("gain", "scale_y", "scale_x")),
        *(constexprs, {"num_warps": 4}, f"lateral_connection_stationary-{description}-{in_channels}to{config}"),
        aligned=True,
        matrix_product=True,
        link=link,
    )
    return dataclasses.replace(described, descriptors=True, capabilities=(90,))


def variants() -> Iterator[Variant]:
    """What a launch compiles for the paper's levels, with a coarser map and alone; and in a pathway."""
    chained = launch.Link(follows=True, leads=True)
    if _kernels(False) is not None:
        yield _variant(TABLE["large"], 256, True, "chained", chained)
        yield _variant(TABLE["medium"], 512, True, "chained", chained)
        for size, in_channels in (("large", 256), ("medium", 256), ("medium", 512), ("small", 512), ("small", 1024)):
            for has_top in (True, False):
                yield _variant(TABLE[size], in_channels, has_top, "merged" if has_top else "alone")
        for config in TABLE.values():
            yield _variant(config, 256, False, "adjoint", turned=True)
    if _kernels(True) is not None:
        yield from _flat_variants()


def _flat_variants() -> Iterator[Variant]:
    chained = launch.Link(follows=True, leads=True)
    for feature, out in (("pixels", "pixels"), ("pixels", "channels"), ("channels", "channels")):
        name = f"{feature}-{out}"
        axes: dict[str, Any] = {"FEATURE": feature, "OUT": out, "MODE": "nearest", "DOUBLED": False}
        merged = {**axes, "DOUBLED": out == "pixels"}
        medium, small = (FLAT_TABLE[out, size] for size in ("medium", "small"))
        for config, in_channels in ((medium, 256), (small, 512), (small, 1024)):
            yield _variant(config, in_channels, True, f"{name}-merged", **merged)
        yield _variant(medium, 256, True, f"{name}-chained", chained, **merged)
        yield _variant(small, 1024, False, f"{name}-alone", **axes)
        yield _variant(flat_tiles(out, 256, False)[0], 256, False, f"{name}-adjoint", turned=True, **axes)
