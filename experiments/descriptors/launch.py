"""`lateral_connection` over tensor descriptors: refusal, tiles, launch.

The same sums as the kernel that serves, in another schedule: operands by bulk tensor copies, persistent programs, the
loads of the next tile issued before the epilogue of this one.  An NCHW feature is read in place (16-bit tensor cores
take both operand orders).  At ratio 2 the coarse pixels of a tile are one more box; at any other ratio they are
gathered by their addresses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from experiments.descriptors import kernels
from fpn_kernels.gpu import geometry
from fpn_kernels.gpu.launch import Launch
from fpn_kernels.operators.output_conv.tiles import BoxConfig, fitting
from fpn_kernels.operators.output_conv.triton import boxed, result_axis, scratch


@dataclasses.dataclass(frozen=True)
class DescriptorConfig(BoxConfig):
    """A box of pixels by output channels; `parts` (1 or 2): the parts in which the epilogue takes the channels."""

    parts: int = 1

    def constexprs(self) -> dict[str, Any]:
        return {**super().constexprs(), "PARTS": self.parts}

    def __str__(self) -> str:
        return f"descriptors {super().__str__()}"


# (arithmetic, size of the tile) -> tile.  The large tile has all 256 channels of the paper's maps, so that each feature
# is read once.  Its epilogue takes them in two parts, which halves the result that is staged in shared memory (compiled
# for sm_90, with a box of coarse pixels: 188,456 bytes instead of 229,416).
TABLE = {
    ("half", "large"): DescriptorConfig(8, 16, 256, 64, 8, 3, parts=2),
    ("half", "medium"): DescriptorConfig(8, 16, 128, 64, 8, 3),
    ("half", "small"): DescriptorConfig(8, 16, 64, 64, 4, 3, ctas_per_sm=2),
    ("tf32", "large"): DescriptorConfig(8, 16, 128, 32, 8, 3),
    ("tf32", "small"): DescriptorConfig(8, 8, 64, 32, 4, 3, ctas_per_sm=2),
    ("ieee", "large"): DescriptorConfig(4, 16, 64, 16, 4, 3, ctas_per_sm=2),
    ("ieee", "small"): DescriptorConfig(4, 8, 32, 16, 4, 3, ctas_per_sm=4),
}

# The output channels and input channels that a program packs.
_PACKED_ROWS, _PACKED_COLUMNS = 8, 64


def descriptor_refusal(name: str, tensor: Tensor, *axes: str) -> str | None:
    """Why a tensor descriptor cannot read or write a map along any of these axes, or None."""
    if geometry.inner_axis(tensor) in axes:
        return None
    layouts = " or ".join({"channels": "NHWC", "pixels": "NCHW"}[axis] for axis in axes)
    return (
        f"{name}, accessed through a tensor descriptor: expected an {layouts} map whose start, strides and contiguous "
        f"axis are multiples of 16 bytes, got the shape {list(tensor.shape)}, the strides {list(tensor.stride())} and "
        f"{tensor.dtype}"
    )


def product_refusal(feature: Tensor, weight: Tensor) -> str | None:
    """Why tiles (of at least 4 x 4 pixels by 32 channels) or offsets of the weight exceed int32, or None."""
    batch, _, height, width = feature.shape
    boxes = batch * -(-height // 4) * -(-width // 4) * -(-weight.shape[0] // 32)
    if boxes >= 2**31:
        return f"{boxes} tiles or more: the kernel counts tiles in int32"
    if geometry.needs_int64(weight) or weight.shape[0] * (weight.shape[1] + 64) >= 2**31:
        return f"the kernel counts the offsets of a weight in int32, got the shape {list(weight.shape)}"
    return None


def refusal(feature: Tensor, weight: Tensor) -> str | None:
    """Why this kernel cannot compute a call that `lateral_connection` serves by Triton, or None."""
    return descriptor_refusal("feature", feature, "channels", "pixels") or product_refusal(feature, weight)


def candidates(
    feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor
) -> list[DescriptorConfig]:
    """The tiles that fit a call, largest first; `weight` is ``[Cout, Cin]``."""
    if refusal(feature, weight) is not None:
        return []
    return fitting(TABLE, geometry.arithmetic_of(feature), out.shape[1], boxed([out]))


def top_reading(feature: Tensor, top: Tensor | None, config: DescriptorConfig) -> str | None:
    """How a tile reads the coarser map: None, "gather", or, at half the size, the axis of its boxes."""
    if top is None:
        return None
    inner = geometry.inner_axis(top)
    if inner is None or not geometry.has_half_the_size(top, feature):
        return "gather"
    # TMA moves at least 16 bytes along the innermost axis.
    narrow = inner == "pixels" and config.columns // 2 < geometry.full_access(top)
    return "gather" if narrow else inner


def _plan_matrix(weight: Tensor, arithmetic: str, depth: int) -> tuple[Callable[[Tensor], Tensor], tuple[int, int]]:
    """Plan how the weight becomes a matrix with contiguous rows: it is packed by a launch unless it is one.

    Returns:
        A function of the weight, and the stride and the number of the matrix's columns.
    """
    out_channels, in_channels = weight.shape
    if arithmetic != "tf32" and geometry.rows_are_aligned(weight):
        return lambda weight: weight, (weight.stride(0), in_channels)
    padded = -(-in_channels // depth) * depth
    pack = Launch(
        kernels.pack,
        (-(-out_channels // _PACKED_ROWS), -(-padded // _PACKED_COLUMNS)),
        (in_channels, out_channels, *geometry.strides(weight), padded),
        {"ARITHMETIC": arithmetic, "ROWS": _PACKED_ROWS, "COLUMNS": _PACKED_COLUMNS},
        weight,
    )

    def packed(weight: Tensor) -> Tensor:
        result = weight.new_empty(out_channels, padded)
        pack(weight, result)
        return result

    return packed, (padded, padded)


def plan(
    config: DescriptorConfig,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str = "nearest",
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, float], None]:
    """Plan the launch that writes the connection into the dense `out`; `weight` is ``[Cout, Cin]``.

    Returns:
        A function of feature, weight, bias, top, out and gain that launches.
    """
    arithmetic, coarse = geometry.arithmetic_of(feature), out if top is None else top
    (batch, in_channels, height, width), out_channels = feature.shape, weight.shape[0]
    matrix, columns = _plan_matrix(weight, arithmetic, config.depth)
    programs = config.ctas_per_sm * geometry.sm_count(feature)
    connect = Launch(
        kernels.connect,
        (min(config.tiles(batch, out_channels, [(height, width)]), programs),),
        (
            *(geometry.scale(coarse.shape[2], height), geometry.scale(coarse.shape[3], width)),
            *(batch, in_channels, out_channels, height, width, *geometry.strides(feature)),
            *(*columns, 0 if bias is None else geometry.strides(bias)[0]),
            *(*coarse.shape[2:], *geometry.strides(coarse)),
        ),
        {
            "MODE": mode,
            "ARITHMETIC": arithmetic,
            "ACCESS": geometry.full_access(feature),
            "FEATURE": geometry.inner_axis(feature),
            "TOP": top_reading(feature, top, config),
            "TOP_CHANNELS": 0 if top is None else geometry.alignment(top, 1, out_channels),
            "OUT": result_axis([out]),
            "BOXED": boxed([out]),
            "BIAS": bias is not None,
            "WIDE": geometry.needs_int64(coarse, out),
            **config.constexprs(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        feature,
    )

    def run(feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor, gain: float) -> None:
        rows = matrix(weight)
        with scratch(feature.device):
            connect(feature, rows, out if bias is None else bias, out if top is None else top, out, gain)

    return run
