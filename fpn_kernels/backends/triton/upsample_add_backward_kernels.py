"""The device code of `upsample_add_backward`: fine pixels read in pairs, in windows, or in tiles of an area."""

# ruff: noqa: N803, N806, SIM108 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton.language as tl

from fpn_kernels.backends.triton.device import (
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
