"""The adjoint of the resize, by gather: each coarse pixel adds up the fine pixels that read it.

A fine pixel's source is non-decreasing along an axis, so the readers of a coarse pixel are a range, found from the
forward's own float32 indices (`device.first_reader`).  No atomics: every coarse pixel is summed by one program, in
float32 and in a fixed order, and rounded once.

Three ways to read a range, by its length: *pairs* (exactly twice the size: two by two, no masks), *windows* of at most
four by four pixels (unrolled, so that all loads are in flight at once), and *areas* of any size (a program to each coarse
pixel, which goes over its fine pixels in tiles).  Each can write, beside its result, the float32 sums of what it
summed: since the weights of a fine pixel add up to 1, these add up to the gradient of the bias (`merge_backward`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.backends.triton import geometry
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.device import (
    bilinear_source,
    first_reader,
    known_multiple,
    rounded,
    start_of,
    tile_of,
)
from fpn_kernels.backends.triton.upsample_add import TileConfig, longest_filled, walk_of

_RUN_TIME = [
    *("channels", "height", "width", "top_height", "top_width"),
    *("grad_n", "grad_c", "grad_y", "grad_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles", "groups"),
]

PAIRS = 1  # the window that marks the two by two, unmasked case
AREA = 0

_PIXELS_BY_CHANNELS = {2: (TileConfig(4, 256, 4), TileConfig(16, 64, 4)), 4: (TileConfig(8, 64, 4),)}
_ROWS_BY_COLUMNS = {2: (TileConfig(16, 32, 4),), 4: (TileConfig(16, 32, 4),)}

# (walk, window, bytes of an element) -> tiles of coarse pixels, the longest first: one 16-byte access a thread of 128 to
# each fine pixel of the window.  An area's tiles are of the fine pixels of a single coarse one.
TABLE = {
    **{("channels", window, n): _PIXELS_BY_CHANNELS[n] for window in (PAIRS, 2, 4) for n in (2, 4)},
    **{("planes", window, n): _ROWS_BY_COLUMNS[n] for window in (PAIRS, 2, 4) for n in (2, 4)},
    ("channels", AREA, 2): (TileConfig(32, 64, 4), TileConfig(8, 64, 2)),
    ("channels", AREA, 4): (TileConfig(32, 32, 4), TileConfig(8, 32, 2)),
    ("planes", AREA, 2): (TileConfig(8, 256, 4), TileConfig(8, 32, 1)),
    ("planes", AREA, 4): (TileConfig(8, 256, 4), TileConfig(8, 32, 1)),
}


def choose(walk: str, window: int, element_size: int, columns: int, longest: int) -> TileConfig:
    """The tile for rows of `columns` elements; for areas, for ranges of up to `longest` fine pixels."""
    tiles = TABLE[walk, window, element_size]
    if window != AREA:
        return longest_filled(tiles, columns)
    large, small = tiles
    return large if 2 * longest >= (large.rows if walk == "channels" else large.columns) else small


def window_of(mode: str, top_size: tuple[int, int], size: tuple[int, int]) -> int:
    """PAIRS, 2 or 4 fine pixels to a side at most, or AREA."""
    if mode != "bilinear" and size == (2 * top_size[0], 2 * top_size[1]):
        return PAIRS
    longest = max(geometry.longest_window(a, b, mode) for a, b in zip(top_size, size, strict=True))
    return 2 if longest <= 2 else 4 if longest <= 4 else AREA


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is computed.

    Attributes:
        walk: "channels" or "planes".
        window: PAIRS, 2, 4 or AREA.
        config: the tile.
        row_tiles, column_tiles: tiles of one image row (channels) or of one plane (planes); of areas, coarse pixels.
        groups: programs to an image row; each goes over a share of its row tiles.
        programs: the grid.
        partials: sums that each channel of the bias is left in.
    """

    walk: str
    window: int
    config: TileConfig
    row_tiles: int
    column_tiles: int
    groups: int
    programs: int
    partials: int


# Partial sums of the bias to a channel: enough programs to fill a GPU, few enough to add up in one small launch.
MOST_PARTIALS = 1024


def plan(
    walk: str, element_size: int, shape: tuple[int, ...], top_size: tuple[int, int], mode: str, bias: bool
) -> Plan:
    """Chooses the tile and the grid for a gradient of `shape` [N, C, H, W]; a pure function."""
    batch, channels, height, width = shape
    top_height, top_width = top_size
    window = window_of(mode, top_size, (height, width))
    longest = max(geometry.longest_window(a, b, mode) for a, b in zip(top_size, (height, width), strict=True))
    config = choose(walk, window, element_size, channels if walk == "channels" else top_width, longest)
    groups = 1
    if window == AREA:
        row_tiles = top_width
        column_tiles = -(-channels // config.columns) if walk == "channels" else channels
        programs = batch * top_height * row_tiles * column_tiles
        partials = batch * top_height * top_width
    elif walk == "channels":
        row_tiles, column_tiles = -(-top_width // config.rows), -(-channels // config.columns)
        groups = row_tiles
        if bias:
            groups = max(1, min(row_tiles, MOST_PARTIALS // (batch * top_height)))
        programs = batch * top_height * groups * column_tiles
        partials = batch * top_height * groups
    else:
        row_tiles, column_tiles = -(-top_height // config.rows), -(-top_width // config.columns)
        programs = batch * channels * row_tiles * column_tiles
        partials = batch * row_tiles * column_tiles
    return Plan(walk, window, config, row_tiles, column_tiles, groups, programs, partials)


@triton.jit
def _bilinear_weight(fine, coarse, scale, size):
    """What fine pixel `fine` takes of coarse pixel `coarse` along one axis (both, where an edge is read twice)."""
    lower, upper, weight = bilinear_source(fine, scale, size)
    return tl.where(lower == coarse, 1.0 - weight, 0.0) + tl.where(upper == coarse, weight, 0.0)


@triton.jit
def _readers(coarse, scale, inverse, size, fine_size, MODE: tl.constexpr):
    """The range of fine pixels that read coarse pixel `coarse`."""
    if MODE == "bilinear":
        first = first_reader(coarse - 1, scale, inverse, size, fine_size, MODE)
    else:
        first = first_reader(coarse, scale, inverse, size, fine_size, MODE)
    return first, first_reader(coarse + 1, scale, inverse, size, fine_size, MODE)


@triton.jit(do_not_specialize=_RUN_TIME)
def gather_channels(
    grad, out, partials, gain, scale_y, scale_x, inverse_y, inverse_x,
    channels, height, width, top_height, top_width,
    grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles, groups,
    MODE: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    partial = program // column_tiles
    group = partial % groups
    y = (partial // groups) % top_height
    n = (partial // groups) // top_height
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    channels = known_multiple(known_multiple(channels, GRAD), OUT)
    out_start = start_of(out, n, y, out_n, out_y, OUT, WIDE)
    if WINDOW != 1:
        y_first, y_end = _readers(y, scale_y, inverse_y, top_height, height, MODE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row_tile in range(group * row_tiles // groups, (group + 1) * row_tiles // groups):
        x = row_tile * ROWS + tl.arange(0, ROWS)
        inside = (x < top_width)[:, None] & (c < channels)[None, :]
        if WINDOW == 1:
            upper = start_of(grad, n, 2 * y, grad_n, grad_y, GRAD, WIDE)
            lower = start_of(grad, n, 2 * y + 1, grad_n, grad_y, GRAD, WIDE)
            left = tile_of(2 * x, c, grad_x, grad_c, GRAD, WIDE)
            right = tile_of(2 * x + 1, c, grad_x, grad_c, GRAD, WIDE)
            upper_left = tl.load(upper + left, mask=inside, other=0.0)
            upper_right = tl.load(upper + right, mask=inside, other=0.0)
            lower_left = tl.load(lower + left, mask=inside, other=0.0)
            lower_right = tl.load(lower + right, mask=inside, other=0.0)
            upper_sum = upper_left.to(tl.float32) + upper_right.to(tl.float32)
            result = upper_sum + (lower_left.to(tl.float32) + lower_right.to(tl.float32))
        else:
            x_first, x_end = _readers(x, scale_x, inverse_x, top_width, width, MODE)
            result = tl.zeros([ROWS, COLUMNS], tl.float32)
            for dy in tl.static_range(WINDOW):
                fine_y = y_first + dy
                start = start_of(grad, n, fine_y, grad_n, grad_y, GRAD, WIDE)
                for dx in tl.static_range(WINDOW):
                    fine_x = x_first + dx
                    read = inside & ((fine_x < x_end) & (fine_y < y_end))[:, None]
                    tile = tile_of(fine_x, c, grad_x, grad_c, GRAD, WIDE)
                    value = tl.load(start + tile, mask=read, other=0.0).to(tl.float32)
                    if MODE == "bilinear":
                        weight = _bilinear_weight(fine_x, x, scale_x, top_width)
                        value = value * (weight * _bilinear_weight(fine_y, y, scale_y, top_height))[:, None]
                    result += value
        stored = rounded(gain * result, out.dtype.element_ty)
        tl.store(out_start + tile_of(x, c, out_x, out_c, OUT, WIDE), stored, mask=inside)
        if BIAS:
            total += result
    if BIAS:
        tl.store(partials + partial * channels + c, tl.sum(total, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=_RUN_TIME)
def gather_planes(
    grad, out, partials, gain, scale_y, scale_x, inverse_y, inverse_x,
    channels, height, width, top_height, top_width,
    grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles, groups,
    MODE: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = (program // column_tiles) % row_tiles
    c = (program // (column_tiles * row_tiles)) % channels
    n = (program // (column_tiles * row_tiles)) // channels
    y = row_tile * ROWS + tl.arange(0, ROWS)
    x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    rows_inside = (y < top_height)[:, None]
    inside = rows_inside & (x < known_multiple(top_width, OUT))[None, :]
    start = start_of(grad, n, c, grad_n, grad_c, GRAD, WIDE)
    if WINDOW == 1:
        fine_x = column_tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        read = rows_inside & (fine_x < known_multiple(width, GRAD))[None, :]
        upper = tl.load(start + tile_of(2 * y, fine_x, grad_y, grad_x, GRAD, WIDE), mask=read, other=0.0)
        lower = tl.load(start + tile_of(2 * y + 1, fine_x, grad_y, grad_x, GRAD, WIDE), mask=read, other=0.0)
        both = upper.to(tl.float32) + lower.to(tl.float32)
        result = tl.sum(tl.reshape(both, [ROWS, COLUMNS, 2]), axis=2)
    else:
        y_first, y_end = _readers(y, scale_y, inverse_y, top_height, height, MODE)
        x_first, x_end = _readers(x, scale_x, inverse_x, top_width, width, MODE)
        result = tl.zeros([ROWS, COLUMNS], tl.float32)
        for dy in tl.static_range(WINDOW):
            fine_y = y_first + dy
            for dx in tl.static_range(WINDOW):
                fine_x = x_first + dx
                read = inside & (fine_y < y_end)[:, None] & (fine_x < x_end)[None, :]
                tile = tile_of(fine_y, fine_x, grad_y, grad_x, 0, WIDE)
                value = tl.load(start + tile, mask=read, other=0.0).to(tl.float32)
                if MODE == "bilinear":
                    value = value * _bilinear_weight(fine_y, y, scale_y, top_height)[:, None]
                    value = value * _bilinear_weight(fine_x, x, scale_x, top_width)[None, :]
                result += value
    stored = rounded(gain * result, out.dtype.element_ty)
    out_start = start_of(out, n, c, out_n, out_c, OUT, WIDE)
    tl.store(out_start + tile_of(y, x, out_y, out_x, OUT, WIDE), stored, mask=inside)
    if BIAS:
        partial = (n * row_tiles + row_tile) * column_tiles + column_tile
        tl.store(partials + partial * channels + c, tl.sum(tl.sum(tl.where(inside, result, 0.0), axis=1), axis=0))


@triton.jit(do_not_specialize=_RUN_TIME)
def gather_area(
    grad, out, partials, gain, scale_y, scale_x, inverse_y, inverse_x,
    channels, height, width, top_height, top_width,
    grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles, groups,
    MODE: tl.constexpr, WALK: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pixel = program // column_tiles
    x = pixel % top_width
    y = (pixel // top_width) % top_height
    n = (pixel // top_width) // top_height
    y_first, y_end = _readers(y, scale_y, inverse_y, top_height, height, MODE)
    x_first, x_end = _readers(x, scale_x, inverse_x, top_width, width, MODE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if WALK == "channels":
        # Tiles of fine pixels of a row, by channels.
        c = (program % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        channels = known_multiple(known_multiple(channels, GRAD), OUT)
        for fine_y in range(y_first, y_end):
            start = start_of(grad, n, fine_y, grad_n, grad_y, GRAD, WIDE)
            for tile_x in range(x_first, x_end, ROWS):
                fine_x = tile_x + tl.arange(0, ROWS)
                read = (fine_x < x_end)[:, None] & (c < channels)[None, :]
                tile = tile_of(fine_x, c, grad_x, grad_c, GRAD, WIDE)
                value = tl.load(start + tile, mask=read, other=0.0).to(tl.float32)
                if MODE == "bilinear":
                    weight = _bilinear_weight(fine_x, x, scale_x, top_width)
                    value = value * (weight * _bilinear_weight(y * 0 + fine_y, y, scale_y, top_height))[:, None]
                total += value
        result = tl.sum(total, axis=0)
        out_start = start_of(out, n, y, out_n, out_y, OUT, WIDE)
        # One coarse pixel: its channels are a row of a tile with a single row.
        place = tile_of(x + tl.arange(0, 1), c, out_x, out_c, OUT, WIDE)
        stored = rounded(gain * result, out.dtype.element_ty)
        tl.store(out_start + place, stored[None, :], mask=(c < channels)[None, :])
        if BIAS:
            tl.store(partials + pixel * channels + c, result, mask=c < channels)
    else:
        # Tiles of rows and columns of a plane.
        c = program % column_tiles
        start = start_of(grad, n, c, grad_n, grad_c, GRAD, WIDE)
        for tile_y in range(y_first, y_end, ROWS):
            fine_y = tile_y + tl.arange(0, ROWS)
            for tile_x in range(x_first, x_end, COLUMNS):
                fine_x = tile_x + tl.arange(0, COLUMNS)
                read = (fine_y < y_end)[:, None] & (fine_x < x_end)[None, :]
                tile = tile_of(fine_y, fine_x, grad_y, grad_x, GRAD, WIDE)
                value = tl.load(start + tile, mask=read, other=0.0).to(tl.float32)
                if MODE == "bilinear":
                    value = value * _bilinear_weight(fine_y, y, scale_y, top_height)[:, None]
                    value = value * _bilinear_weight(fine_x, x, scale_x, top_width)[None, :]
                total += value
        result = tl.sum(tl.sum(total, axis=1), axis=0)
        out_start = start_of(out, n, c, out_n, out_c, OUT, WIDE)
        place = tile_of(y + tl.arange(0, 1), x + tl.arange(0, 1), out_y, out_x, OUT, WIDE)
        tl.store(out_start + place, tl.full([1, 1], 0.0, tl.float32) + rounded(gain * result, out.dtype.element_ty))
        if BIAS:
            tl.store(partials + pixel * channels + c, result)


def launch(
    chosen: Plan, grad: Tensor, out: Tensor, partials: Tensor | None, mode: str, gain: float
) -> None:
    """Writes ``gain * adjoint(grad)`` into `out`; unscaled sums into `partials`, float32 [chosen.partials, C]."""
    _, channels, height, width = grad.shape
    top_height, top_width = out.shape[2:]
    if chosen.walk == "channels":
        alignments = [geometry.alignment(t, 1, channels) for t in (grad, out)]
    else:
        alignments = [geometry.alignment(grad, 3, width), geometry.alignment(out, 3, top_width)]
    constexprs: dict[str, Any] = {"WINDOW": chosen.window}
    kernel = gather_channels if chosen.walk == "channels" else gather_planes
    if chosen.window == AREA:
        kernel, constexprs = gather_area, {"WALK": chosen.walk}
    with geometry.device_guard(grad):
        kernel[(chosen.programs,)](
            *(grad, out, out if partials is None else partials, gain),
            *(geometry.scale(top_height, height), geometry.scale(top_width, width)),
            *(geometry.scale(height, top_height), geometry.scale(width, top_width)),
            *(channels, height, width, top_height, top_width),
            *geometry.strides(grad),
            *geometry.strides(out),
            *(chosen.row_tiles, chosen.column_tiles, chosen.groups),
            MODE="nearest" if chosen.window == PAIRS else mode,
            **constexprs,
            BIAS=partials is not None,
            WIDE=geometry.needs_int64(grad, out),
            GRAD=alignments[0],
            OUT=alignments[1],
            ROWS=chosen.config.rows,
            COLUMNS=chosen.config.columns,
            num_warps=chosen.config.num_warps,
            # Contracted, the bilinear indices would differ in the last bit from those that windows were sized by.
            enable_fp_fusion=False,
        )


def upsample_add_backward(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> Tensor:
    out = allocate((*grad.shape[:2], *top_size), grad, result_format(grad))
    chosen = plan(walk_of(out), grad.element_size(), tuple(grad.shape), top_size, mode, bias=False)
    launch(chosen, grad, out, None, mode, gain)
    return out


def gather_variants(name: str, bias: bool) -> Iterator[Variant]:
    """What `launch` may compile: every tile of the table on dense maps, and 16-bit ones on strided maps."""
    cases = [(key, tile, 16) for key, tiles in TABLE.items() for tile in tiles]
    cases += [(key, tiles[0], 0) for key, tiles in TABLE.items() if key[2] == 2]
    for (walk, window, size), config, alignment in cases:
        kernel = gather_channels if walk == "channels" else gather_planes
        area = {"WALK": walk} if window == AREA else {"WINDOW": window}
        for mode in ("nearest",) if window in (PAIRS, 2) else ("nearest", "bilinear"):
            yield variant(
                gather_area if window == AREA else kernel,
                {"grad": POINTER_TYPES[size], "out": POINTER_TYPES[size], "partials": "*fp32"},
                ("gain", "scale_y", "scale_x", "inverse_y", "inverse_x"),
                {
                    **{"MODE": mode, **area, "BIAS": bias, "WIDE": alignment == 0},
                    **{"GRAD": alignment, "OUT": alignment},
                    **{"ROWS": config.rows, "COLUMNS": config.columns},
                },
                {"num_warps": config.num_warps, "enable_fp_fusion": False},
                f"{name}-{walk}-{mode}-{f'window{window}' if window else 'area'}-{8 * size}bit"
                f"-{config.rows}x{config.columns}-{'dense' if alignment else 'strided'}",
                aligned=alignment > 0,
                wide=("LDG",) if alignment and (walk == "channels" or window == PAIRS) else (),
            )


def variants() -> Iterator[Variant]:
    return gather_variants("upsample_add_backward", bias=False)
