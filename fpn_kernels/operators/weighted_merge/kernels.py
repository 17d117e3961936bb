"""The device code of `weighted_merge`: channels or image rows, and the normalisation of the weights."""

# ruff: noqa: N803, N806 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import (
    device_function,
    kernel,
    known_multiple,
    rounded,
    row_tile_of,
    rows_of,
    start_of,
    tile_of,
    widened,
)
from fpn_kernels.gpu.resize import resized_pixels, resized_rows

_RUN_TIME = [
    *("normalization", "last_factor", "channels", "height", "width", "last_height", "last_width"),
    *("first_n", "first_c", "first_y", "first_x"),
    *("middle_n", "middle_c", "middle_y", "middle_x"),
    *("last_n", "last_c", "last_y", "last_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles"),
]

# By their places: what the kernel is told.
NORMALIZATIONS = ("none", "relu", "softmax")
_RELU, _SOFTMAX = (tl.constexpr(NORMALIZATIONS.index(name)) for name in ("relu", "softmax"))


@device_function
def pixels_of(
    base, n, y, x, c, stride_n, stride_c, stride_y, stride_x, inside, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr
):
    """Pixels `x` of row `y` of image `n` by channels `c`."""
    start = start_of(base, n, y, stride_n, stride_y, ALIGNMENT, WIDE)
    return tl.load(start + row_tile_of(x, c, stride_x, stride_c, ALIGNMENT, WIDE), mask=inside)


@device_function
def image_rows_of(start, c, y, x, stride_c, stride_y, stride_x, inside, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """Columns `x` of the rows `y`, one for each of the channels `c`."""
    rows = rows_of(c, y, stride_c, stride_y, ALIGNMENT, WIDE)
    return tl.load(start + tile_of(rows, x, stride_x, ALIGNMENT, WIDE), mask=inside)


@device_function
def summed(first, middle, last, f_first, f_middle, f_last, THIRD: tl.constexpr):
    """The weighted sum of three tiles, or of the first and the last."""
    total = f_first * first.to(tl.float32)
    if THIRD:
        total += f_middle * middle.to(tl.float32)
    return total + f_last * last.to(tl.float32)


@device_function
def unscaled(weight, largest, normalization):
    """A weight before it is divided by the sum of all; NaN stays NaN."""
    positive = tl.where(weight <= 0.0, 0.0, weight)
    weight = tl.where(normalization == _RELU, positive, weight)
    return tl.where(normalization == _SOFTMAX, tl.exp(weight - largest), weight)


@device_function
def normalized(weights, eps, normalization, last_factor, THIRD: tl.constexpr):
    """The factors of the first, the middle and the last map."""
    first, second = tl.load(weights).to(tl.float32), tl.load(weights + 1).to(tl.float32)
    largest = tl.maximum(first, second)
    if THIRD:
        third = tl.load(weights + 2).to(tl.float32)
        largest = tl.maximum(largest, third)
    first, second = unscaled(first, largest, normalization), unscaled(second, largest, normalization)
    total = first + second
    if THIRD:
        third = unscaled(third, largest, normalization)
        total += third
    else:
        third = second
    total = tl.where(normalization == 0, 1.0, total + eps)
    # Rounded as PyTorch's quotients are: the language's own division is not.
    first, second, third = tl.div_rn(first, total), tl.div_rn(second, total), tl.div_rn(third, total)
    is_second = last_factor == 1
    return first, tl.where(is_second, third, second), tl.where(is_second, second, third)


@kernel(_RUN_TIME)
def weighted_channels(
    first, middle, last, weights, out, scale_y, scale_x, eps, normalization, last_factor,
    channels, height, width, last_height, last_width,
    first_n, first_c, first_y, first_x,
    middle_n, middle_c, middle_y, middle_x,
    last_n, last_c, last_y, last_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    READING: tl.constexpr, MODE: tl.constexpr, THIRD: tl.constexpr, WIDE: tl.constexpr,
    FIRST: tl.constexpr, MIDDLE: tl.constexpr, LAST: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    row_tile = program % row_tiles
    program = program // row_tiles
    x = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    channels = known_multiple(known_multiple(known_multiple(known_multiple(channels, FIRST), MIDDLE), LAST), OUT)
    inside = (c < channels)[None, :]
    DTYPE: tl.constexpr = out.dtype.element_ty
    f_first, f_middle, f_last = normalized(weights, eps, normalization, last_factor, THIRD)
    if READING == "pairs":
        y = program % last_height
        n = program // last_height
        inside = inside & (x < last_width)[:, None]
        coarse = pixels_of(last, n, y, x, c, last_n, last_c, last_y, last_x, inside, LAST, WIDE)
        # All loads come before the first store, behind which none of them could be moved.
        upper_left = pixels_of(first, n, 2 * y, 2 * x, c, first_n, first_c, first_y, first_x, inside, FIRST, WIDE)
        upper_right = pixels_of(first, n, 2 * y, 2 * x + 1, c, first_n, first_c, first_y, first_x, inside, FIRST, WIDE)
        lower_left = pixels_of(first, n, 2 * y + 1, 2 * x, c, first_n, first_c, first_y, first_x, inside, FIRST, WIDE)
        lower_right = pixels_of(
            first, n, 2 * y + 1, 2 * x + 1, c, first_n, first_c, first_y, first_x, inside, FIRST, WIDE
        )
        m_upper_left, m_upper_right, m_lower_left, m_lower_right = upper_left, upper_right, lower_left, lower_right
        if THIRD:
            m_upper_left = pixels_of(
                middle, n, 2 * y, 2 * x, c, middle_n, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE
            )
            m_upper_right = pixels_of(
                middle, n, 2 * y, 2 * x + 1, c, middle_n, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE
            )
            m_lower_left = pixels_of(
                middle, n, 2 * y + 1, 2 * x, c, middle_n, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE
            )
            m_lower_right = pixels_of(
                middle, n, 2 * y + 1, 2 * x + 1, c, middle_n, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE
            )
        upper = start_of(out, n, 2 * y, out_n, out_y, OUT, WIDE)
        lower = start_of(out, n, 2 * y + 1, out_n, out_y, OUT, WIDE)
        left = row_tile_of(2 * x, c, out_x, out_c, OUT, WIDE)
        right = row_tile_of(2 * x + 1, c, out_x, out_c, OUT, WIDE)
        result = summed(upper_left, m_upper_left, coarse, f_first, f_middle, f_last, THIRD)
        tl.store(upper + left, rounded(result, DTYPE), mask=inside)
        result = summed(upper_right, m_upper_right, coarse, f_first, f_middle, f_last, THIRD)
        tl.store(upper + right, rounded(result, DTYPE), mask=inside)
        result = summed(lower_left, m_lower_left, coarse, f_first, f_middle, f_last, THIRD)
        tl.store(lower + left, rounded(result, DTYPE), mask=inside)
        result = summed(lower_right, m_lower_right, coarse, f_first, f_middle, f_last, THIRD)
        tl.store(lower + right, rounded(result, DTYPE), mask=inside)
    else:
        y = program % height
        n = program // height
        inside = inside & (x < width)[:, None]
        value = pixels_of(first, n, y, x, c, first_n, first_c, first_y, first_x, inside, FIRST, WIDE)
        m_value = value
        if THIRD:
            m_value = pixels_of(middle, n, y, x, c, middle_n, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE)
        if READING == "same":
            other = pixels_of(last, n, y, x, c, last_n, last_c, last_y, last_x, inside, LAST, WIDE).to(tl.float32)
        else:
            other = resized_pixels(
                last, n, y, x, c, scale_y, scale_x, last_height, last_width, last_n, last_c, last_y, last_x,
                inside, MODE, LAST, WIDE,
            )  # fmt: skip
        result = rounded(summed(value, m_value, other, f_first, f_middle, f_last, THIRD), DTYPE)
        start = start_of(out, n, y, out_n, out_y, OUT, WIDE)
        tl.store(start + row_tile_of(x, c, out_x, out_c, OUT, WIDE), result, mask=inside)


@kernel(_RUN_TIME)
def weighted_planes(
    first, middle, last, weights, out, scale_y, scale_x, eps, normalization, last_factor,
    channels, height, width, last_height, last_width,
    first_n, first_c, first_y, first_x,
    middle_n, middle_c, middle_y, middle_x,
    last_n, last_c, last_y, last_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    READING: tl.constexpr, MODE: tl.constexpr, THIRD: tl.constexpr, WIDE: tl.constexpr,
    FIRST: tl.constexpr, MIDDLE: tl.constexpr, LAST: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    # Rows of all channels, one after another: a tile may span several small planes.
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    n = program // row_tiles
    DTYPE: tl.constexpr = out.dtype.element_ty
    first = first + widened(n, WIDE) * known_multiple(first_n, FIRST)
    middle = middle + widened(n, WIDE) * known_multiple(middle_n, MIDDLE)
    last = last + widened(n, WIDE) * known_multiple(last_n, LAST)
    out = out + widened(n, WIDE) * known_multiple(out_n, OUT)
    width = known_multiple(known_multiple(known_multiple(width, FIRST), MIDDLE), OUT)
    x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    f_first, f_middle, f_last = normalized(weights, eps, normalization, last_factor, THIRD)
    if READING == "pairs":
        c = row // last_height
        y = row - c * last_height
        rows_inside = (c < channels)[:, None]
        fine_x = column_tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        coarse_inside = rows_inside & (x < known_multiple(last_width, LAST))[None, :]
        inside = rows_inside & (fine_x < width)[None, :]
        coarse = image_rows_of(last, c, y, x, last_c, last_y, last_x, coarse_inside, LAST, WIDE)
        upper = image_rows_of(first, c, 2 * y, fine_x, first_c, first_y, first_x, inside, FIRST, WIDE)
        lower = image_rows_of(first, c, 2 * y + 1, fine_x, first_c, first_y, first_x, inside, FIRST, WIDE)
        m_upper, m_lower = upper, lower
        if THIRD:
            m_upper = image_rows_of(middle, c, 2 * y, fine_x, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE)
            m_lower = image_rows_of(middle, c, 2 * y + 1, fine_x, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE)
        coarse = tl.interleave(coarse, coarse)
        upper = rounded(summed(upper, m_upper, coarse, f_first, f_middle, f_last, THIRD), DTYPE)
        lower = rounded(summed(lower, m_lower, coarse, f_first, f_middle, f_last, THIRD), DTYPE)
        upper_rows = rows_of(c, 2 * y, out_c, out_y, OUT, WIDE)
        lower_rows = rows_of(c, 2 * y + 1, out_c, out_y, OUT, WIDE)
        tl.store(out + tile_of(upper_rows, fine_x, out_x, OUT, WIDE), upper, mask=inside)
        tl.store(out + tile_of(lower_rows, fine_x, out_x, OUT, WIDE), lower, mask=inside)
    else:
        c = row // height
        y = row - c * height
        inside = (c < channels)[:, None] & (x < width)[None, :]
        value = image_rows_of(first, c, y, x, first_c, first_y, first_x, inside, FIRST, WIDE)
        m_value = value
        if THIRD:
            m_value = image_rows_of(middle, c, y, x, middle_c, middle_y, middle_x, inside, MIDDLE, WIDE)
        if READING == "same":
            other = image_rows_of(last, c, y, x, last_c, last_y, last_x, inside, LAST, WIDE).to(tl.float32)
        else:
            other = resized_rows(
                last, c, y, x, scale_y, scale_x, last_height, last_width, last_c, last_y, last_x, inside, MODE, WIDE
            )
        result = rounded(summed(value, m_value, other, f_first, f_middle, f_last, THIRD), DTYPE)
        tl.store(out + tile_of(rows_of(c, y, out_c, out_y, OUT, WIDE), x, out_x, OUT, WIDE), result, mask=inside)


_BACKWARD_RUN_TIME = [
    *("channels", "height", "width"),
    *("grad_n", "grad_c", "grad_y", "grad_x"),
    *("input_n", "input_c", "input_y", "input_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles"),
]


@kernel(_BACKWARD_RUN_TIME)
def scale_and_sum(
    grad, input, factor, out, partials,
    channels, height, width,
    grad_n, grad_c, grad_y, grad_x,
    input_n, input_c, input_y, input_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    WALK: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, INPUT: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row = (program // column_tiles % row_tiles) * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n = program // column_tiles // row_tiles
    grad = grad + widened(n, WIDE) * known_multiple(grad_n, GRAD)
    input = input + widened(n, WIDE) * known_multiple(input_n, INPUT)
    out = out + widened(n, WIDE) * known_multiple(out_n, OUT)
    # A row is a pixel with its channels, or a row of a plane with its columns.
    if WALK == "channels":
        channels = known_multiple(known_multiple(known_multiple(channels, GRAD), INPUT), OUT)
        y = row // width
        x = row - y * width
        inside = (y < height)[:, None] & (column < channels)[None, :]
        grad_tile = tile_of(rows_of(y, x, grad_y, grad_x, GRAD, WIDE), column, grad_c, GRAD, WIDE)
        input_tile = tile_of(rows_of(y, x, input_y, input_x, INPUT, WIDE), column, input_c, INPUT, WIDE)
        out_tile = tile_of(rows_of(y, x, out_y, out_x, OUT, WIDE), column, out_c, OUT, WIDE)
    else:
        width = known_multiple(known_multiple(known_multiple(width, GRAD), INPUT), OUT)
        c = row // height
        y = row - c * height
        inside = (c < channels)[:, None] & (column < width)[None, :]
        grad_tile = tile_of(rows_of(c, y, grad_c, grad_y, GRAD, WIDE), column, grad_x, GRAD, WIDE)
        input_tile = tile_of(rows_of(c, y, input_c, input_y, INPUT, WIDE), column, input_x, INPUT, WIDE)
        out_tile = tile_of(rows_of(c, y, out_c, out_y, OUT, WIDE), column, out_x, OUT, WIDE)
    value = tl.load(grad + grad_tile, mask=inside, other=0.0)
    other = tl.load(input + input_tile, mask=inside, other=0.0)
    value = value.to(tl.float32)
    tl.store(out + out_tile, rounded(tl.load(factor) * value, out.dtype.element_ty), mask=inside)
    products = value * other.to(tl.float32)
    tl.store(partials + program, tl.sum(tl.sum(products, axis=1), axis=0))
