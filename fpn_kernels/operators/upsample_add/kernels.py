"""The device code of `upsample_add_backward`: fine pixels read in pairs, in windows, or in tiles of an area."""

# ruff: noqa: N803, N806, SIM108 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import (
    along,
    bilinear_weight,
    kernel,
    known_multiple,
    loop_bound,
    readers,
    rounded,
    row_tile_of,
    rows_of,
    start_of,
    tile_of,
    widened,
)
from fpn_kernels.gpu.resize import resized_pixels, resized_rows

_RUN_TIME = [
    *("channels", "height", "width", "top_height", "top_width"),
    *("grad_n", "grad_c", "grad_y", "grad_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles", "groups"),
]


@kernel(_RUN_TIME)
def gather_channels(
    grad, out, own, partials, gain, scale_y, scale_x, inverse_y, inverse_x,
    channels, height, width, top_height, top_width,
    grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles, groups,
    MODE: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
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
        y_first, y_end = readers(y, scale_y, inverse_y, top_height, height, MODE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_tile, end_tile = group * row_tiles // groups, (group + 1) * row_tiles // groups
    for row_tile in range(loop_bound(first_tile), loop_bound(end_tile)):
        x = row_tile * ROWS + tl.arange(0, ROWS)
        inside = (x < top_width)[:, None] & (c < channels)[None, :]
        if WINDOW == 1:
            upper = start_of(grad, n, 2 * y, grad_n, grad_y, GRAD, WIDE)
            lower = start_of(grad, n, 2 * y + 1, grad_n, grad_y, GRAD, WIDE)
            left = row_tile_of(2 * x, c, grad_x, grad_c, GRAD, WIDE)
            right = row_tile_of(2 * x + 1, c, grad_x, grad_c, GRAD, WIDE)
            upper_left = tl.load(upper + left, mask=inside, other=0.0)
            upper_right = tl.load(upper + right, mask=inside, other=0.0)
            lower_left = tl.load(lower + left, mask=inside, other=0.0)
            lower_right = tl.load(lower + right, mask=inside, other=0.0)
            upper_sum = upper_left.to(tl.float32) + upper_right.to(tl.float32)
            result = upper_sum + (lower_left.to(tl.float32) + lower_right.to(tl.float32))
        else:
            x_first, x_end = readers(x, scale_x, inverse_x, top_width, width, MODE)
            result = tl.zeros([ROWS, COLUMNS], tl.float32)
            for dx in tl.static_range(WINDOW):
                fine_x = x_first + dx
                tile = row_tile_of(fine_x, c, grad_x, grad_c, GRAD, WIDE)
                column_inside = inside & (fine_x < x_end)[:, None]
                column = tl.zeros([ROWS, COLUMNS], tl.float32)
                for dy in tl.static_range(WINDOW):
                    fine_y = y_first + dy
                    start = start_of(grad, n, fine_y, grad_n, grad_y, GRAD, WIDE)
                    value = tl.load(start + tile, mask=column_inside & (fine_y < y_end), other=0.0).to(tl.float32)
                    if MODE == "bilinear":
                        value = value * bilinear_weight(fine_y, y, scale_y, top_height)
                    column += value
                if MODE == "bilinear":
                    column = column * bilinear_weight(fine_x, x, scale_x, top_width)[:, None]
                result += column
        place = row_tile_of(x, c, out_x, out_c, OUT, WIDE)
        scaled = gain * result
        if OWN:
            scaled += tl.load(start_of(own, n, y, out_n, out_y, OUT, WIDE) + place, mask=inside, other=0.0)
        tl.store(out_start + place, rounded(scaled, out.dtype.element_ty), mask=inside)
        if BIAS:
            total += result
    if BIAS:
        tl.store(partials + partial * channels + c, tl.sum(total, axis=0), mask=c < channels)


@kernel(_RUN_TIME)
def gather_planes(
    grad, out, own, partials, gain, scale_y, scale_x, inverse_y, inverse_x,
    channels, height, width, top_height, top_width,
    grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles, groups,
    MODE: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    # Rows of all channels, one after another: a tile may span several small planes.
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    n = program // row_tiles
    c = row // top_height
    y = row - c * top_height
    x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    rows_inside = (c < channels)[:, None]
    inside = rows_inside & (x < known_multiple(top_width, OUT))[None, :]
    start = grad + widened(n, WIDE) * known_multiple(grad_n, GRAD)
    if WINDOW == 1:
        fine_x = column_tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        read = rows_inside & (fine_x < known_multiple(width, GRAD))[None, :]
        upper_rows = rows_of(c, 2 * y, grad_c, grad_y, GRAD, WIDE)
        lower_rows = rows_of(c, 2 * y + 1, grad_c, grad_y, GRAD, WIDE)
        upper = tl.load(start + tile_of(upper_rows, fine_x, grad_x, GRAD, WIDE), mask=read, other=0.0)
        lower = tl.load(start + tile_of(lower_rows, fine_x, grad_x, GRAD, WIDE), mask=read, other=0.0)
        both = upper.to(tl.float32) + lower.to(tl.float32)
        result = tl.sum(tl.reshape(both, [ROWS, COLUMNS, 2]), axis=2)
    else:
        y_first, y_end = readers(y, scale_y, inverse_y, top_height, height, MODE)
        x_first, x_end = readers(x, scale_x, inverse_x, top_width, width, MODE)
        result = tl.zeros([ROWS, COLUMNS], tl.float32)
        for dy in tl.static_range(WINDOW):
            fine_y = y_first + dy
            fine_rows = rows_of(c, fine_y, grad_c, grad_y, 0, WIDE)
            row_inside = inside & (fine_y < y_end)[:, None]
            line = tl.zeros([ROWS, COLUMNS], tl.float32)
            for dx in tl.static_range(WINDOW):
                fine_x = x_first + dx
                tile = tile_of(fine_rows, fine_x, grad_x, 0, WIDE)
                value = tl.load(start + tile, mask=row_inside & (fine_x < x_end)[None, :], other=0.0).to(tl.float32)
                if MODE == "bilinear":
                    value = value * bilinear_weight(fine_x, x, scale_x, top_width)[None, :]
                line += value
            if MODE == "bilinear":
                line = line * bilinear_weight(fine_y, y, scale_y, top_height)[:, None]
            result += line
    place = tile_of(rows_of(c, y, out_c, out_y, OUT, WIDE), x, out_x, OUT, WIDE)
    image = widened(n, WIDE) * known_multiple(out_n, OUT)
    scaled = gain * result
    if OWN:
        scaled += tl.load(own + image + place, mask=inside, other=0.0)
    tl.store(out + image + place, rounded(scaled, out.dtype.element_ty), mask=inside)
    if BIAS:
        partial = (n * column_tiles + column_tile) * top_height + y
        tl.store(partials + partial.to(tl.int64) * channels + c, tl.sum(result, axis=1), mask=c < channels)


@kernel(_RUN_TIME)
def gather_area(
    grad, out, own, partials, gain, scale_y, scale_x, inverse_y, inverse_x,
    channels, height, width, top_height, top_width,
    grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles, groups,
    MODE: tl.constexpr, WALK: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel_tile = program % column_tiles
    pixel = program // column_tiles
    x = pixel % top_width
    y = (pixel // top_width) % top_height
    n = (pixel // top_width) // top_height
    y_first, y_end = readers(y, scale_y, inverse_y, top_height, height, MODE)
    x_first, x_end = readers(x, scale_x, inverse_x, top_width, width, MODE)
    # The longer axis of the tile is the one that is contiguous: channels or the pixels of a fine row.
    CHANNELS: tl.constexpr = COLUMNS if WALK == "channels" else ROWS
    PIXELS: tl.constexpr = ROWS if WALK == "channels" else COLUMNS
    c = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    if WALK == "channels":
        channels = known_multiple(channels, GRAD)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile_x in range(loop_bound(x_first), loop_bound(x_end), PIXELS):
        fine_x = tile_x + tl.arange(0, PIXELS)
        if WALK == "channels":
            read = (fine_x < x_end)[:, None] & (c < channels)[None, :]
            tile = row_tile_of(fine_x, c, grad_x, grad_c, GRAD, WIDE)
        else:
            read = (c < channels)[:, None] & (fine_x < x_end)[None, :]
            tile = row_tile_of(c, fine_x, grad_c, grad_x, GRAD, WIDE)
        column = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(0, loop_bound(y_end - y_first)):
            fine_y = y_first + step
            start = start_of(grad, n, fine_y, grad_n, grad_y, GRAD, WIDE)
            value = tl.load(start + tile, mask=read, other=0.0).to(tl.float32)
            if MODE == "bilinear":
                value = value * bilinear_weight(fine_y, y, scale_y, top_height)
            column += value
        if MODE == "bilinear":
            weight = bilinear_weight(fine_x, x, scale_x, top_width)
            if WALK == "channels":
                column = column * weight[:, None]
            else:
                column = column * weight[None, :]
        total += column
    if WALK == "channels":
        result = tl.sum(total, axis=0)
    else:
        result = tl.sum(total, axis=1)
    place = widened(x, WIDE) * out_x + along(widened(c, WIDE), out_c, OUT)
    # Without an own gradient: its load spilled here on sm_90 (`merge_backward` adds it afterwards).
    tl.static_assert(not OWN)
    stored = rounded(gain * result, out.dtype.element_ty)
    tl.store(start_of(out, n, y, out_n, out_y, 0, WIDE) + place, stored, mask=c < channels)
    if BIAS:
        tl.store(partials + pixel.to(tl.int64) * channels + c, result, mask=c < channels)


@kernel(["count", "channels"])
def sum_partials(partials, bias, gain, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < channels
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, loop_bound(count), ROWS):
        row = first + tl.arange(0, ROWS)
        # int64: areas leave one partial to a coarse pixel.
        place = row.to(tl.int64)[:, None] * channels + c[None, :]
        total += tl.load(partials + place, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    tl.store(bias + c, rounded(gain * tl.sum(total, axis=0), bias.dtype.element_ty), mask=inside)


_MERGE_RUN_TIME = [
    *("channels", "height", "width", "top_height", "top_width"),
    *("top_n", "top_c", "top_y", "top_x"),
    *("lateral_n", "lateral_c", "lateral_y", "lateral_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles"),
]


@kernel(_MERGE_RUN_TIME)
def merge_channels(
    top, lateral, out, gain, scale_y, scale_x,
    channels, height, width, top_height, top_width,
    top_n, top_c, top_y, top_x,
    lateral_n, lateral_c, lateral_y, lateral_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    MODE: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
    TOP: tl.constexpr, LATERAL: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    row_tile = program % row_tiles
    program = program // row_tiles
    x = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    channels = known_multiple(known_multiple(known_multiple(channels, TOP), LATERAL), OUT)
    inside = (c < channels)[None, :]
    DTYPE: tl.constexpr = out.dtype.element_ty
    if PAIRS:
        y = program % top_height
        n = program // top_height
        inside = inside & (x < top_width)[:, None]
        top_start = start_of(top, n, y, top_n, top_y, TOP, WIDE)
        upper_lateral = start_of(lateral, n, 2 * y, lateral_n, lateral_y, LATERAL, WIDE)
        lower_lateral = start_of(lateral, n, 2 * y + 1, lateral_n, lateral_y, LATERAL, WIDE)
        upper_out = start_of(out, n, 2 * y, out_n, out_y, OUT, WIDE)
        lower_out = start_of(out, n, 2 * y + 1, out_n, out_y, OUT, WIDE)
        left = row_tile_of(2 * x, c, lateral_x, lateral_c, LATERAL, WIDE)
        right = row_tile_of(2 * x + 1, c, lateral_x, lateral_c, LATERAL, WIDE)
        coarse = tl.load(top_start + row_tile_of(x, c, top_x, top_c, TOP, WIDE), mask=inside)
        upper_left = tl.load(upper_lateral + left, mask=inside)
        upper_right = tl.load(upper_lateral + right, mask=inside)
        lower_left = tl.load(lower_lateral + left, mask=inside)
        lower_right = tl.load(lower_lateral + right, mask=inside)
        coarse = coarse.to(tl.float32)
        left = row_tile_of(2 * x, c, out_x, out_c, OUT, WIDE)
        right = row_tile_of(2 * x + 1, c, out_x, out_c, OUT, WIDE)
        tl.store(upper_out + left, rounded(gain * (upper_left.to(tl.float32) + coarse), DTYPE), mask=inside)
        tl.store(upper_out + right, rounded(gain * (upper_right.to(tl.float32) + coarse), DTYPE), mask=inside)
        tl.store(lower_out + left, rounded(gain * (lower_left.to(tl.float32) + coarse), DTYPE), mask=inside)
        tl.store(lower_out + right, rounded(gain * (lower_right.to(tl.float32) + coarse), DTYPE), mask=inside)
    else:
        y = program % height
        n = program // height
        inside = inside & (x < width)[:, None]
        lateral_start = start_of(lateral, n, y, lateral_n, lateral_y, LATERAL, WIDE)
        value = tl.load(lateral_start + row_tile_of(x, c, lateral_x, lateral_c, LATERAL, WIDE), mask=inside)
        coarse = resized_pixels(
            top, n, y, x, c, scale_y, scale_x, top_height, top_width, top_n, top_c, top_y, top_x,
            inside, MODE, TOP, WIDE,
        )  # fmt: skip
        result = rounded(gain * (value.to(tl.float32) + coarse), DTYPE)
        out_start = start_of(out, n, y, out_n, out_y, OUT, WIDE)
        tl.store(out_start + row_tile_of(x, c, out_x, out_c, OUT, WIDE), result, mask=inside)


@kernel(_MERGE_RUN_TIME)
def merge_planes(
    top, lateral, out, gain, scale_y, scale_x,
    channels, height, width, top_height, top_width,
    top_n, top_c, top_y, top_x,
    lateral_n, lateral_c, lateral_y, lateral_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    MODE: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
    TOP: tl.constexpr, LATERAL: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    n = program // row_tiles
    DTYPE: tl.constexpr = out.dtype.element_ty
    top_start = top + widened(n, WIDE) * known_multiple(top_n, TOP)
    lateral_start = lateral + widened(n, WIDE) * known_multiple(lateral_n, LATERAL)
    out_start = out + widened(n, WIDE) * known_multiple(out_n, OUT)
    width = known_multiple(known_multiple(width, LATERAL), OUT)
    if PAIRS:
        # Rows of all channels of the coarse map, one after another: a tile may span several small planes.
        c = row // top_height
        y = row - c * top_height
        rows_inside = (c < channels)[:, None]
        x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        fine_x = column_tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        coarse_inside = rows_inside & (x < known_multiple(top_width, TOP))[None, :]
        inside = rows_inside & (fine_x < width)[None, :]
        coarse_rows = rows_of(c, y, top_c, top_y, TOP, WIDE)
        upper_rows = rows_of(c, 2 * y, lateral_c, lateral_y, LATERAL, WIDE)
        lower_rows = rows_of(c, 2 * y + 1, lateral_c, lateral_y, LATERAL, WIDE)
        coarse = tl.load(top_start + tile_of(coarse_rows, x, top_x, TOP, WIDE), mask=coarse_inside)
        upper = tl.load(lateral_start + tile_of(upper_rows, fine_x, lateral_x, LATERAL, WIDE), mask=inside)
        lower = tl.load(lateral_start + tile_of(lower_rows, fine_x, lateral_x, LATERAL, WIDE), mask=inside)
        coarse = tl.interleave(coarse, coarse).to(tl.float32)
        upper = rounded(gain * (upper.to(tl.float32) + coarse), DTYPE)
        lower = rounded(gain * (lower.to(tl.float32) + coarse), DTYPE)
        upper_rows = rows_of(c, 2 * y, out_c, out_y, OUT, WIDE)
        lower_rows = rows_of(c, 2 * y + 1, out_c, out_y, OUT, WIDE)
        tl.store(out_start + tile_of(upper_rows, fine_x, out_x, OUT, WIDE), upper, mask=inside)
        tl.store(out_start + tile_of(lower_rows, fine_x, out_x, OUT, WIDE), lower, mask=inside)
    else:
        c = row // height
        y = row - c * height
        x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = (c < channels)[:, None] & (x < width)[None, :]
        lateral_rows = rows_of(c, y, lateral_c, lateral_y, LATERAL, WIDE)
        value = tl.load(lateral_start + tile_of(lateral_rows, x, lateral_x, LATERAL, WIDE), mask=inside)
        coarse = resized_rows(
            top_start, c, y, x, scale_y, scale_x, top_height, top_width, top_c, top_y, top_x, inside, MODE, WIDE
        )
        result = rounded(gain * (value.to(tl.float32) + coarse), DTYPE)
        out_rows = rows_of(c, y, out_c, out_y, OUT, WIDE)
        tl.store(out_start + tile_of(out_rows, x, out_x, OUT, WIDE), result, mask=inside)
