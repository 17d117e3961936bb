"""A tile of a map that is resized while it is read, in float32; for the kernels that merge."""

# ruff: noqa: N803 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import (
    bilinear_source,
    device_function,
    nearest_source,
    row_tile_of,
    rows_of,
    start_of,
    tile_of,
)


@device_function
def resized_pixels(
    top, n, y, x, c, scale_y, scale_x, top_height, top_width, top_n, top_c, top_y, top_x,
    inside, MODE: tl.constexpr, TOP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pixels `x` of row `y` of image `n` by channels `c`, vectorised along these."""
    if MODE == "bilinear":
        y0, y1, weight_y = bilinear_source(y, scale_y, top_height)
        x0, x1, weight_x = bilinear_source(x, scale_x, top_width)
        upper = start_of(top, n, y0, top_n, top_y, TOP, WIDE)
        lower = start_of(top, n, y1, top_n, top_y, TOP, WIDE)
        left = row_tile_of(x0, c, top_x, top_c, TOP, WIDE)
        right = row_tile_of(x1, c, top_x, top_c, TOP, WIDE)
        upper_left = tl.load(upper + left, mask=inside)
        upper_right = tl.load(upper + right, mask=inside)
        lower_left = tl.load(lower + left, mask=inside)
        lower_right = tl.load(lower + right, mask=inside)
        x_of_right = weight_x[:, None]
        upper_row = (1.0 - x_of_right) * upper_left.to(tl.float32) + x_of_right * upper_right.to(tl.float32)
        lower_row = (1.0 - x_of_right) * lower_left.to(tl.float32) + x_of_right * lower_right.to(tl.float32)
        result = (1.0 - weight_y) * upper_row + weight_y * lower_row
    else:
        source_y = nearest_source(y, scale_y, top_height, MODE)
        source_x = nearest_source(x, scale_x, top_width, MODE)
        start = start_of(top, n, source_y, top_n, top_y, TOP, WIDE)
        result = tl.load(start + row_tile_of(source_x, c, top_x, top_c, TOP, WIDE), mask=inside).to(tl.float32)
    return result


@device_function
def resized_rows(
    top_start, c, y, x, scale_y, scale_x, top_height, top_width, top_c, top_y, top_x,
    inside, MODE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns `x` of the rows `y`, one for each of the channels `c`.

    Neighbouring pixels need not read neighbouring coarse pixels: their column stride is never assumed to be 1.
    """
    if MODE == "bilinear":
        y0, y1, weight_y = bilinear_source(y, scale_y, top_height)
        x0, x1, weight_x = bilinear_source(x, scale_x, top_width)
        upper_rows = rows_of(c, y0, top_c, top_y, 0, WIDE)
        lower_rows = rows_of(c, y1, top_c, top_y, 0, WIDE)
        upper_left = tl.load(top_start + tile_of(upper_rows, x0, top_x, 0, WIDE), mask=inside)
        upper_right = tl.load(top_start + tile_of(upper_rows, x1, top_x, 0, WIDE), mask=inside)
        lower_left = tl.load(top_start + tile_of(lower_rows, x0, top_x, 0, WIDE), mask=inside)
        lower_right = tl.load(top_start + tile_of(lower_rows, x1, top_x, 0, WIDE), mask=inside)
        x_of_right = weight_x[None, :]
        y_of_lower = weight_y[:, None]
        upper_row = (1.0 - x_of_right) * upper_left.to(tl.float32) + x_of_right * upper_right.to(tl.float32)
        lower_row = (1.0 - x_of_right) * lower_left.to(tl.float32) + x_of_right * lower_right.to(tl.float32)
        result = (1.0 - y_of_lower) * upper_row + y_of_lower * lower_row
    else:
        source_y = nearest_source(y, scale_y, top_height, MODE)
        source_x = nearest_source(x, scale_x, top_width, MODE)
        rows = rows_of(c, source_y, top_c, top_y, 0, WIDE)
        result = tl.load(top_start + tile_of(rows, source_x, top_x, 0, WIDE), mask=inside).to(tl.float32)
    return result
