"""`weighted_merge` by Triton: two or three maps times their factors, in one pass, summed in float32, rounded once.

The walks, and the tiles of coarse pixels at ratio 2, are those of `upsample_add`.  At most one map is resized: the last
one.  The *middle* one of three has the size of the first.  The programs read and normalise the weights: the host never
waits for them, and no launch is needed.  (On an H100, PyTorch's launches for that made a node of 100 x 160 pixels take
16.4 us, where torch.compile's one kernel took 8.4 us.)

The backward computes ``factor * grad`` and the sum of ``grad * input`` in one pass over both.  There are no atomics:
each program writes the float32 sum of its tile, and one reduction adds these in a fixed order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.gpu.launch import Launch, stand_in
from fpn_kernels.gpu.tiles import TileConfig, fitting, reading_of, walk_of
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.layouts import allocator, result_format
from fpn_kernels.operators.weighted_merge.call import WeightedMerge, WeightedMergeBackward

# Dtypes of weights that the kernels read on every chip: compute capability 8.0 reads only one of the 8-bit floats.
_READABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# (walk, how the last map is read, bytes per element) -> tiles, the longest first; of coarse pixels for "pairs".  As
# for `upsample_add`, without its tiles for very few channels: the narrowest BiFPN has 64.
TABLE = {
    **{("channels", reading, 2): (TileConfig(8, 256, 4), TileConfig(32, 64, 4)) for reading in ("same", "nearest")},
    **{("channels", reading, 2): (TileConfig(4, 256, 4), TileConfig(16, 64, 4)) for reading in ("pairs", "bilinear")},
    **{("channels", reading, 4): (TileConfig(16, 64, 4),) for reading in ("same", "nearest")},
    **{("channels", reading, 4): (TileConfig(8, 64, 4),) for reading in ("pairs", "bilinear")},
    **{("planes", "pairs", size): (TileConfig(16, 32, 4),) for size in (2, 4)},
    **{("planes", reading, 2): (TileConfig(32, 64, 4),) for reading in ("same", "nearest")},
    **{("planes", reading, 4): (TileConfig(16, 64, 4),) for reading in ("same", "nearest")},
    **{("planes", "bilinear", size): (TileConfig(16, 64, 4),) for size in (2, 4)},
}


def choose(walk: str, reading: str, element_size: int, columns: int, access: int, third: bool) -> TileConfig:
    """The tile for rows of `columns` elements, of three maps if `third`; see `tiles.fitting`."""
    tile = fitting(TABLE[walk, reading, element_size], columns, access)
    if third and access <= 1 and (walk, reading, element_size) == ("planes", "nearest", 2):
        # With 32 rows, Triton 3.6 uses 64 registers and spills two (sm_90; 3.7 spills none).
        return dataclasses.replace(tile, rows=tile.rows // 2)
    return tile


def plan_merge(
    first: Tensor,
    middle: Tensor | None,
    last: Tensor,
    last_factor: int,
    out: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> Launch:
    """Plan the launch that writes the weighted sum into `out`.

    Args:
        first, middle, last: the maps; only `last` may have another size than `first`.
        last_factor: the index of the last map's weight, 1 or 2.
        out: only shape and strides are read.

    Returns:
        The launch, a function of first, middle (first where there is none), last, the weights and out.
    """
    from fpn_kernels.operators.weighted_merge import kernels

    batch, channels, height, width = first.shape
    last_height, last_width = last.shape[2:]
    walk = walk_of(out)
    reading = "same" if last.shape == first.shape else reading_of(mode, (last_height, last_width), (height, width))
    pairs = reading == "pairs"
    third = middle is not None
    same_size = {"FIRST": first, "MIDDLE": first if middle is None else middle, "OUT": out}
    if walk == "channels":
        launched, columns, outer = kernels.weighted_channels, channels, batch * (last_height if pairs else height)
        rows = last_width if pairs else width
        alignments = {name: geometry.alignment(x, 1, channels) for name, x in (*same_size.items(), ("LAST", last))}
    else:
        launched, outer = kernels.weighted_planes, batch
        rows, columns = (channels * last_height, last_width) if pairs else (channels * height, width)
        alignments = {name: geometry.alignment(x, 3, width) for name, x in same_size.items()}
        # At other ratios, and in bilinear mode, the map is gathered element by element.
        alignments["LAST"] = geometry.alignment(last, 3, last_width) if reading in ("same", "pairs") else 0
    gathered = walk == "planes" and reading in ("nearest", "bilinear")
    access = min(a for name, a in alignments.items() if name != "LAST" or not gathered)
    config = choose(walk, reading, first.element_size(), columns, access, third)
    row_tiles, column_tiles = -(-rows // config.rows), -(-columns // config.columns)
    return Launch(
        launched,
        (row_tiles * column_tiles * outer,),
        (
            *(geometry.scale(last_height, height), geometry.scale(last_width, width)),
            # eps is added to the sum of the positive parts only.
            eps if normalization == "relu" else 0.0,
            *(
                kernels.NORMALIZATIONS.index(normalization),
                last_factor,
                channels,
                height,
                width,
                last_height,
                last_width,
            ),
            *geometry.strides(first),
            *geometry.strides(same_size["MIDDLE"]),
            *geometry.strides(last),
            *geometry.strides(out),
            *(row_tiles, column_tiles),
        ),
        {
            "READING": reading,
            "MODE": mode if reading in ("nearest", "bilinear") else "nearest",
            "THIRD": third,
            "WIDE": geometry.needs_int64(first, same_size["MIDDLE"], last, out),
            **alignments,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
            # Products are rounded before they are summed, as on the CPU and under the interpreter.
            "enable_fp_fusion": False,
        },
        first,
    )


# (walk, bytes per element) -> tiles, the longest first: two 16-byte accesses per thread of 128 for each tensor.
BACKWARD_TABLE = {
    ("channels", 2): (TileConfig(8, 256, 4), TileConfig(32, 64, 4)),
    ("channels", 4): (TileConfig(16, 64, 4),),
    ("planes", 2): (TileConfig(32, 64, 4),),
    ("planes", 4): (TileConfig(16, 64, 4),),
}


def choose_backward(walk: str, element_size: int, columns: int, access: int) -> TileConfig:
    """The tile for rows of `columns` elements; see `tiles.fitting`."""
    return fitting(BACKWARD_TABLE[walk, element_size], columns, access)


def plan_backward(grad: Tensor, input: Tensor, out: Tensor) -> tuple[Launch, int]:
    """Plan the launch that writes ``factor * grad`` into `out` and the float32 sum of each tile's products.

    Returns:
        The launch, a function of grad, input, factor, out and the sums; and the number of sums.
    """
    from fpn_kernels.operators.weighted_merge import kernels

    batch, channels, height, width = grad.shape
    walk = walk_of(out)
    rows, columns, dim = (height * width, channels, 1) if walk == "channels" else (channels * height, width, 3)
    alignments = {
        name: geometry.alignment(tensor, dim, columns)
        for name, tensor in (("GRAD", grad), ("INPUT", input), ("OUT", out))
    }
    config = choose_backward(walk, grad.element_size(), columns, min(alignments.values()))
    row_tiles, column_tiles = -(-rows // config.rows), -(-columns // config.columns)
    programs = batch * row_tiles * column_tiles
    scaled = Launch(
        kernels.scale_and_sum,
        (programs,),
        (
            *(channels, height, width),
            *geometry.strides(grad),
            *geometry.strides(input),
            *geometry.strides(out),
            *(row_tiles, column_tiles),
        ),
        {
            "WALK": walk,
            "WIDE": geometry.needs_int64(grad, input, out),
            **alignments,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
            "enable_fp_fusion": False,
        },
        grad,
    )
    return scaled, programs


def _readable(weights: Tensor) -> Tensor:
    """The weights as the kernels read them: contiguous, in a dtype that every chip reads."""
    return (weights if weights.dtype in _READABLE else weights.float()).contiguous()


def _refusal(call: WeightedMerge) -> str | None:
    first = call.first
    resized = [x for x in (call.second, call.third) if x is not None and x.shape != first.shape]
    if len(resized) > 1:
        return "two maps to be resized: the kernels resize one at most"
    top = resized[0] if resized else first
    return (
        availability.tensor_refusal(first)
        or availability.side_refusal(*top.shape[2:], *first.shape[2:])
        or availability.rows_refusal(first.shape[1], first.shape[2])
    )


def _plan(call: WeightedMerge) -> Callable[[WeightedMerge], Tensor]:
    first, second, third = call.first, call.second, call.third
    shape, out_format = first.shape, result_format(first)
    new, like = allocator(shape, out_format), stand_in(shape, first, out_format)
    # Only the last map may have another size.
    second_is_last = third is None or second.shape != first.shape
    middle, last, last_factor = (third, second, 1) if second_is_last else (second, third, 2)
    assert last is not None
    merge = plan_merge(first, middle, last, last_factor, like, call.mode, call.normalization, call.eps)

    def run(call: WeightedMerge) -> Tensor:
        first = call.first
        out = new(first)
        middle, last = (call.third, call.second) if second_is_last else (call.second, call.third)
        merge(first, first if middle is None else middle, last, _readable(call.weights), out)
        return out

    return run


def _backward_refusal(call: WeightedMergeBackward) -> str | None:
    grad = call.grad
    return (
        availability.tensor_refusal(grad)
        or availability.rows_refusal(grad.shape[1], grad.shape[2])
        or availability.pixels_refusal(*grad.shape[2:])
    )


def _plan_backward(call: WeightedMergeBackward) -> Callable[[WeightedMergeBackward], tuple[Tensor, Tensor]]:
    grad = call.grad
    shape, out_format = grad.shape, result_format(grad)
    new = allocator(shape, out_format)
    scale, programs = plan_backward(grad, call.input, stand_in(shape, grad, out_format))

    def run(call: WeightedMergeBackward) -> tuple[Tensor, Tensor]:
        grad = call.grad
        out = new(grad)
        partials = torch.empty(programs, dtype=torch.float32, device=grad.device)
        scale(grad, call.input, call.factor, out, partials)
        return out, partials.sum()

    return run


WEIGHTED_MERGE = dispatch.Implementation(
    autotune.planned(_plan),
    _refusal,
    lambda call: availability.interpreter_only(call.first),
)
WEIGHTED_MERGE_BACKWARD = dispatch.Implementation(
    autotune.planned(_plan_backward),
    _backward_refusal,
    lambda call: availability.interpreter_only(call.grad),
)
