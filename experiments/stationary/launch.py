"""`lateral_connection` with the weight in shared memory: refusals, tiles, launch.

The kernel that serves fetches the weight for each of the 1,000 tiles of C2: it moves 5.2 TB/s through L2 on an H100,
where memory moves 1.6.  Here a program fetches the weight once, and copies, products and epilogues overlap in groups of
warps of their own (`kernels.py`).

For 16-bit maps on compute capability 9.0.  In NHWC, with a coarser map of half the size or none, a tile is a box of
pixels (`kernels.py`); in NCHW, and in NHWC with any coarser map, a tile is flat (`flat_kernels.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.descriptors.launch import descriptor_refusal, product_refusal
from experiments.stationary import flat_kernels, kernels
from fpn_kernels.gpu import availability, geometry
from fpn_kernels.gpu.launch import ALONE, Launch, Link
from fpn_kernels.operators.output_conv.triton import scratch

# The shared memory of a CTA on Hopper (227 KB, 1 KB of it reserved), less barriers and the arguments of the warps.
_SHARED_BYTES = 226 * 1024 - 1536
_MIN_STAGES, _MAX_STAGES = 4, 8


@dataclasses.dataclass(frozen=True)
class StationaryConfig:
    """A tile: pixels by output channels, and the input channels of a chunk.

    Attributes:
        rows, columns: the pixels, 64 of them: a group of four warps has as many rows of a product.
        channels: output channels of a program.
        depth: input channels of a chunk: `channels`, or half as many.
        flat: the pixels are consecutive in the image, and their coarse pixels are gathered.
    """

    rows: int
    columns: int
    channels: int
    depth: int
    flat: bool = False

    def chunks(self, in_channels: int) -> int:
        return -(-in_channels // self.depth)

    def stages(self, in_channels: int, has_top: bool) -> int:
        """The number of chunks that fit into shared memory with the weight and the coarse pixels."""
        pixels, element = self.rows * self.columns, 2
        weight = self.chunks(in_channels) * self.depth * self.channels * element
        tops = kernels.GROUPS.value * pixels // 4 * self.channels * element if has_top and not self.flat else 0
        return min(_MAX_STAGES, (_SHARED_BYTES - weight - tops) // (pixels * self.depth * element))

    def fits(self, in_channels: int, out_channels: int, has_top: bool) -> bool:
        # The result takes the slots of the last chunks of its own tile.
        holds_result = self.chunks(in_channels) >= self.channels // self.depth
        is_filled = out_channels > self.channels // 2
        if self.flat and has_top:
            is_filled = out_channels % self.channels == 0  # coarse pixels are gathered without a mask
        return holds_result and is_filled and self.stages(in_channels, has_top) >= _MIN_STAGES

    def __str__(self) -> str:
        box = "flat " if self.flat else f"{self.rows}x"
        return f"stationary {box}{self.columns}x{self.channels}x{self.depth}"


# Shared memory holds all 256 channels of C2's weight (128 KB), half of C3's, a quarter of C4's.
TABLE = {
    "large": StationaryConfig(4, 16, 256, 128),
    "medium": StationaryConfig(4, 16, 128, 128),
    "small": StationaryConfig(4, 16, 64, 64),
}

# (axis of the result, size) -> tile.
FLAT_TABLE = {
    ("channels", "large"): StationaryConfig(1, 64, 256, 128, flat=True),
    ("channels", "medium"): StationaryConfig(1, 64, 128, 128, flat=True),
    ("channels", "small"): StationaryConfig(1, 64, 64, 64, flat=True),
    ("pixels", "medium"): StationaryConfig(1, 64, 128, 64, flat=True),
    ("pixels", "small"): StationaryConfig(1, 64, 64, 64, flat=True),
}
_MAX_CHUNKS_OF_PIXELS = 4


def _flat_axis(tensor: Tensor) -> str | None:
    """`geometry.inner_axis` of a map whose pixels are one axis."""
    return geometry.inner_axis(tensor.flatten(2).unsqueeze(2)) if geometry.pixels_are_flat(tensor) else None


def _product_refusal(feature: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> str | None:
    if availability.INTERPRETED:
        return "the interpreter does not run Gluon"
    if feature.is_cuda and availability.capability(feature.device.index)[0] != 9:
        return "the kernel uses the tensor cores of compute capability 9.0"
    if feature.dtype == torch.float32:
        return "the kernel multiplies 16-bit numbers"
    if not (geometry.rows_are_aligned(weight) or geometry.rows_are_aligned(weight.t())):
        return "the weight is read through a tensor descriptor: a matrix with contiguous rows or columns"
    if bias is not None and geometry.strides(bias)[0] != 1:
        return "the bias is not contiguous"
    if geometry.needs_int64(feature, out):
        return "the kernel counts strides in int32"
    return product_refusal(feature, weight)


def refusal(feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor) -> str | None:
    """Why the kernel with boxes cannot compute a call that `lateral_connection` serves by Triton, or None."""
    maps = (("feature", feature), ("the result", out), *(() if top is None else (("top", top),)))
    reasons = [descriptor_refusal(name, each, "channels") for name, each in maps]
    if top is not None and not geometry.has_half_the_size(top, out):
        reasons.append("the coarser map does not have half the size of the finer one")
    return next(filter(None, reasons), None) or _product_refusal(feature, weight, bias, out)


def flat_refusal(feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor) -> str | None:
    """Why the kernel with flat tiles cannot compute such a call, or None."""
    axis = _flat_axis(out)
    if axis is None or _flat_axis(feature) is None:
        return "feature and result are accessed through tensor descriptors, with their pixels as one axis"
    if axis == "pixels" and _flat_axis(feature) == "channels":
        return "a result in NCHW needs a feature in NCHW"
    if top is not None and axis == "channels" and geometry.inner_axis(top) != "channels":
        return "a result in NHWC needs a top in NHWC"
    if top is not None and axis == "pixels" and not geometry.has_half_the_size(top, out):
        return "the coarser map does not have half the size of the finer one"
    if top is not None and geometry.needs_int64(top):
        return "the kernel counts offsets in int32"
    return _product_refusal(feature, weight, bias, out)


def candidates(
    feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor
) -> list[StationaryConfig]:
    """The tiles that fit a call, largest first; `weight` is ``[Cout, Cin]``."""
    call, has_top = (feature, weight, bias, top, out), top is not None
    if refusal(*call) is None:
        table = list(TABLE.values())
    elif flat_refusal(*call) is None:
        table = _flat_tiles(_flat_axis(out), weight.shape[1], has_top)
    else:
        return []
    return [config for config in table if config.fits(weight.shape[1], weight.shape[0], has_top)]


def _flat_tiles(axis: str | None, in_channels: int, has_top: bool) -> list[StationaryConfig]:
    """The tiles of an axis of the result that do not spill."""
    tiles = {size: config for (along, size), config in FLAT_TABLE.items() if along == axis}
    # With a coarser map, 45 instructions access local memory (compiled); in NCHW with 8 chunks, 4 do.
    if axis == "channels" and has_top:
        del tiles["large"]
    if axis == "pixels" and tiles["medium"].chunks(in_channels) > _MAX_CHUNKS_OF_PIXELS:
        del tiles["medium"]
    return list(tiles.values())


def plan(
    config: StationaryConfig,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str = "nearest",
    link: Link = ALONE,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, float], Sequence[Tensor]]:
    """Plan the launch that writes the connection into the dense `out`; `weight` is ``[Cout, Cin]``.

    Returns:
        A function of feature, weight, bias, top, out and gain that launches.  It returns the buffers that must live
        until an overlapping launch is queued.
    """
    assert config.flat or top is not None or not link.follows, "only the loader of tops waits for the previous launch"
    in_channels, out_channels = feature.shape[1], weight.shape[0]
    tiles, numbers = (_flat_numbers if config.flat else _numbers)(config, feature, weight, top, out)
    channel_tiles = -(-out_channels // config.channels)
    # One program per SM, and as many for each tile of channels.
    programs = min(max(1, geometry.sm_count(feature) // channel_tiles), tiles)
    launch = Launch(
        (flat_kernels if config.flat else kernels).connect,
        (programs * channel_tiles,),
        (*numbers, channel_tiles),
        {
            "TRANSPOSED": not geometry.rows_are_aligned(weight),
            "BIAS": bias is not None,
            "HAS_TOP": top is not None,
            "CHANNELS": config.channels,
            "DEPTH": config.depth,
            "CHUNKS": config.chunks(in_channels),
            "STAGES": config.stages(in_channels, top is not None),
            **(
                _flat_constants(config, feature, top, out, mode)
                if config.flat
                else {"ROWS": config.rows, "COLUMNS": config.columns}
            ),
            **link.constants(),
            "num_warps": 4,
        },
        feature,
    )

    def run(
        feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor, gain: float
    ) -> Sequence[Tensor]:
        with scratch(feature.device) as used:
            launch(feature, weight, out if bias is None else bias, out if top is None else top, out, gain)
        return tuple(used)

    return run


def _row(weight: Tensor) -> int:
    """The stride of the matrix's rows, or of its columns where those are contiguous."""
    return weight.stride(0) if geometry.rows_are_aligned(weight) else weight.stride(1)


def _numbers(
    config: StationaryConfig, feature: Tensor, weight: Tensor, top: Tensor | None, out: Tensor
) -> tuple[int, tuple[Any, ...]]:
    """The number of tiles of pixels, and the numbers of the launch."""
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
    """The strides of images, rows and pixels of an NHWC map; TMA allows no stride of 0, even along a size of 1."""
    channels, height, width = tensor.shape[1:]
    n, _, y, x = geometry.strides(tensor)
    x = x or channels
    y = y or width * x
    return n or height * y, y, x


def _flat_steps(tensor: Tensor) -> tuple[int, int]:
    """The strides of a map's images and of the axis that is not contiguous, pixels or channels."""
    channels, dim = tensor.shape[1], 2 if _flat_axis(tensor) == "channels" else 1
    flat = tensor.flatten(2)
    n, row = geometry.strides(flat)[0], geometry.strides(flat)[dim] or flat.shape[3 - dim]
    return n or channels * flat.shape[2], row


def _flat_constants(
    config: StationaryConfig, feature: Tensor, top: Tensor | None, out: Tensor, mode: str
) -> dict[str, Any]:
    axis = _flat_axis(out)
    doubled = axis == "pixels" and top is not None
    return {"PIXELS": config.columns, "FEATURE": _flat_axis(feature), "OUT": axis, "MODE": mode, "DOUBLED": doubled}
