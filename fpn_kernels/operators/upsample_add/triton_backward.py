"""The backward of `upsample_add` by Triton: the adjoint of the resize, by gather.

A fine pixel's source is non-decreasing along an axis, so the readers of a coarse pixel are a range, found from the
forward's own float32 indices (`indexing.first_reader`).  There are no atomics: one program sums each coarse pixel, in
float32 and in a fixed order, and rounds once.

Three ways to read a range, by its length: *pairs* (exactly twice the size: two by two, no masks), *windows* of at most
four by four pixels (unrolled, so that all loads are in flight at once), and *areas* of any size (one program per coarse
pixel, which walks over its fine pixels in tiles).

`merge_backward` needs the gradient of the bias as well.  The weights of a fine pixel add up to 1, so the sum over the
coarse pixels is the sum over all fine pixels: the gather leaves float32 partial sums, a few hundred per channel, and a
second small kernel adds them in a fixed order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.gpu.launch import Launch, stand_in
from fpn_kernels.gpu.tiles import TileConfig, fitting, walk_of
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.layouts import allocator, result_format
from fpn_kernels.operators.upsample_add.call import MergeBackward, UpsampleAddBackward

PAIRS = 1  # the window of the two by two case, which needs no masks
AREA = 0

_PIXELS_BY_CHANNELS = {
    2: (TileConfig(4, 256, 4), TileConfig(16, 64, 4), TileConfig(64, 16, 4)),
    4: (TileConfig(8, 64, 4), TileConfig(32, 16, 4)),
}
_ROWS_BY_COLUMNS = {2: (TileConfig(16, 32, 4),), 4: (TileConfig(16, 32, 4),)}

# (walk, window, bytes per element) -> tiles of coarse pixels, the longest first: one 16-byte access per thread of 128
# for each fine pixel of the window.  An area's tiles hold the fine pixels of a single coarse one.
TABLE = {
    **{("channels", window, n): _PIXELS_BY_CHANNELS[n] for window in (PAIRS, 2, 4) for n in (2, 4)},
    **{("planes", window, n): _ROWS_BY_COLUMNS[n] for window in (PAIRS, 2, 4) for n in (2, 4)},
    ("channels", AREA, 2): (TileConfig(16, 64, 4),),
    ("channels", AREA, 4): (TileConfig(16, 32, 4),),
    ("planes", AREA, 2): (TileConfig(16, 64, 4),),
    ("planes", AREA, 4): (TileConfig(16, 64, 4),),
}


def choose(walk: str, window: int, element_size: int, columns: int, access: int) -> TileConfig:
    """The tile for rows of `columns` elements; see `tiles.fitting`."""
    return fitting(TABLE[walk, window, element_size], columns, access)


def window_of(mode: str, top_size: tuple[int, int], size: tuple[int, int]) -> int:
    """PAIRS, at most 2 or at most 4 fine pixels per side, or AREA."""
    if mode != "bilinear" and size == (2 * top_size[0], 2 * top_size[1]):
        return PAIRS
    longest = max(geometry.longest_window(a, b, mode) for a, b in zip(top_size, size, strict=True))
    return 2 if longest <= 2 else 4 if longest <= 4 else AREA


@dataclasses.dataclass(frozen=True)
class Gather:
    """The tile and the grid of one gather.

    Attributes:
        walk: "channels" or "planes".
        window: PAIRS, 2, 4 or AREA.
        config: the tile.
        grad_alignment, out_alignment: `geometry.alignment` along the contiguous axis of each.
        row_tiles: tiles of one image row (channels) or of all rows of an image (planes); of areas, coarse pixels.
        column_tiles: tiles of the channels, or of an image row (planes).
        groups: programs per image row; each walks over a share of its row tiles.
        programs: the grid.
        partials: partial sums per channel of the bias.
    """

    walk: str
    window: int
    config: TileConfig
    grad_alignment: int
    out_alignment: int
    row_tiles: int
    column_tiles: int
    groups: int
    programs: int
    partials: int


# Partial sums per channel of the bias: enough programs to fill a GPU, few enough to be a small part of the traffic (at
# 200 x 320 fine pixels in 16 bits, 1.5 %) and to be summed in one small launch.
MAX_PARTIALS = 512


def plan_gather(grad: Tensor, out: Tensor, mode: str, bias: bool, config: TileConfig | None = None) -> Gather:
    """Choose the tile and the grid that gather `grad` into `out`; `config` is for measurements."""
    batch, channels, height, width = grad.shape
    top_height, top_width = out.shape[2:]
    walk = walk_of(out)
    window = window_of(mode, (top_height, top_width), (height, width))
    if walk == "channels":
        grad_alignment, out_alignment = (geometry.alignment(t, 1, channels) for t in (grad, out))
    elif window == AREA:
        # A coarse pixel's range starts anywhere, and its channels lie a plane apart.
        grad_alignment, out_alignment = min(geometry.alignment(grad, 3), 1), 0
    else:
        grad_alignment, out_alignment = geometry.alignment(grad, 3, width), geometry.alignment(out, 3, top_width)
    access = grad_alignment if window == AREA else min(grad_alignment, out_alignment)
    if config is None:
        columns = channels if walk == "channels" else top_width
        config = choose(walk, window, grad.element_size(), columns, access)
        if autotune.ENABLED and access > 1:
            config = autotune.fastest(
                "upsample_add_backward",
                (walk, window, access, bias, columns, *autotune.size_class(batch * channels * height * width)),
                grad,
                TABLE[walk, window, grad.element_size()],
                config,
                lambda candidate: _try(plan_gather(grad, out, mode, bias, candidate), grad, out, mode, bias),
            )
    groups = 1
    if window == AREA:
        row_tiles = top_width
        column_tiles = -(-channels // (config.columns if walk == "channels" else config.rows))
        programs = batch * top_height * row_tiles * column_tiles
        partials = batch * top_height * top_width
    elif walk == "channels":
        row_tiles, column_tiles = -(-top_width // config.rows), -(-channels // config.columns)
        groups = row_tiles
        if bias:
            groups = max(1, min(row_tiles, MAX_PARTIALS // (batch * top_height)))
        programs = batch * top_height * groups * column_tiles
        partials = batch * top_height * groups
    else:
        row_tiles, column_tiles = -(-channels * top_height // config.rows), -(-top_width // config.columns)
        programs = batch * row_tiles * column_tiles
        partials = batch * column_tiles * top_height
    return Gather(
        *(walk, window, config, grad_alignment, out_alignment),
        *(row_tiles, column_tiles, groups, programs, partials),
    )


def gather(chosen: Gather, grad: Tensor, out: Tensor, mode: str, *, bias: bool, upstream: bool) -> Launch:
    """Build the launch that writes ``upstream + gain * adjoint(grad)`` into `out`.

    With `bias`, it also writes the unscaled sums of each channel into partials, float32 [chosen.partials, C].

    Returns:
        The launch, a function of grad, out, upstream (with the strides of `out`), partials and gain; `out` takes the
        place of upstream and partials where there are none.  Of `out`, only shape and strides are read here.
    """
    from fpn_kernels.operators.upsample_add import kernels

    _, channels, height, width = grad.shape
    top_height, top_width = out.shape[2:]
    constexprs: dict[str, Any] = {"WINDOW": chosen.window}
    launched = kernels.gather_channels if chosen.walk == "channels" else kernels.gather_planes
    if chosen.window == AREA:
        launched, constexprs = kernels.gather_area, {"WALK": chosen.walk}
    return Launch(
        launched,
        (chosen.programs,),
        (
            *(geometry.scale(top_height, height), geometry.scale(top_width, width)),
            *(geometry.scale(height, top_height), geometry.scale(width, top_width)),
            *(channels, height, width, top_height, top_width),
            *geometry.strides(grad),
            *geometry.strides(out),
            *(chosen.row_tiles, chosen.column_tiles, chosen.groups),
        ),
        {
            "MODE": "nearest" if chosen.window == PAIRS else mode,
            **constexprs,
            "BIAS": bias,
            "OWN": upstream,
            "WIDE": geometry.needs_int64(grad, out),
            "GRAD": chosen.grad_alignment,
            "OUT": chosen.out_alignment,
            "ROWS": chosen.config.rows,
            "COLUMNS": chosen.config.columns,
            "num_warps": chosen.config.num_warps,
            # Contracted, the bilinear indices would differ in the last bit from those that windows were sized by.
            "enable_fp_fusion": False,
        },
        grad,
    )


# Partials and channels per step: 32-byte runs, so that 256 channels still occupy 32 SMs.
REDUCTION = TileConfig(256, 8, 4)


def reduction(like: Tensor, count: int) -> Launch:
    """Build the launch that sums `count` partial sums per channel: a function of partials, bias and gain."""
    from fpn_kernels.operators.upsample_add import kernels

    channels = like.shape[1]
    return Launch(
        kernels.sum_partials,
        (-(-channels // REDUCTION.columns),),
        (count, channels),
        {"ROWS": REDUCTION.rows, "COLUMNS": REDUCTION.columns, "num_warps": REDUCTION.num_warps},
        like,
    )


def _try(chosen: Gather, grad: Tensor, out: Tensor, mode: str, bias: bool) -> None:
    """Launch a plan into results that nothing reads."""
    out = torch.empty_like(out, device=grad.device)
    partials = grad.new_empty((chosen.partials, grad.shape[1]), dtype=torch.float32) if bias else out
    gather(chosen, grad, out, mode, bias=bias, upstream=False)(grad, out, out, partials, 1.0)


def _refusal(call: UpsampleAddBackward) -> str | None:
    grad, top_size = call.grad, call.top_size
    return (
        availability.tensor_refusal(grad)
        or availability.side_refusal(*grad.shape[2:], *top_size)
        or availability.rows_refusal(grad.shape[1], max(grad.shape[2], top_size[0]))
    )


def _plan_adjoint(call: UpsampleAddBackward) -> Callable[[UpsampleAddBackward], Tensor]:
    grad, shape, out_format = call.grad, call.shape(), result_format(call.grad)
    new, like = allocator(shape, out_format), stand_in(shape, grad, out_format)
    adjoint = gather(plan_gather(grad, like, call.mode, bias=False), grad, like, call.mode, bias=False, upstream=False)

    def run(call: UpsampleAddBackward) -> Tensor:
        out = new(call.grad)
        adjoint(call.grad, out, out, out, call.gain)
        return out

    return run


def _plan_merge_backward(call: MergeBackward) -> Callable[[MergeBackward], tuple[Tensor, Tensor]]:
    grad, shape, out_format = call.grad, call.adjoint().shape(), result_format(call.grad)
    channels = grad.shape[1]
    new, like = allocator(shape, out_format), stand_in(shape, grad, out_format)
    chosen = plan_gather(grad, like, call.mode, bias=True)
    # An upstream gradient with the strides of the result is read in the same pass, at the offsets that are written.
    upstream = call.upstream
    alike = upstream is not None and chosen.window != AREA and geometry.strides(upstream) == geometry.strides(like)
    adjoint = gather(chosen, grad, like, call.mode, bias=True, upstream=alike)
    reduce = reduction(grad, chosen.partials)

    def run(call: MergeBackward) -> tuple[Tensor, Tensor]:
        grad, upstream = call.grad, call.upstream
        out = new(grad)
        partials = torch.empty((chosen.partials, channels), dtype=torch.float32, device=grad.device)
        bias = grad.new_empty(channels)
        adjoint(grad, out, upstream if alike else out, partials, call.gain)
        reduce(partials, bias, call.gain)
        return out if upstream is None or alike else out.add_(upstream), bias

    return run


UPSAMPLE_ADD_BACKWARD = dispatch.Implementation(
    autotune.planned(_plan_adjoint),
    _refusal,
    lambda call: availability.interpreter_only(call.grad),
)
MERGE_BACKWARD = dispatch.Implementation(
    autotune.planned(_plan_merge_backward),
    lambda call: _refusal(call.adjoint()),
    lambda call: availability.interpreter_only(call.grad),
)
