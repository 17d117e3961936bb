"""The 3x3 convolution as an implicit matrix product over tensor descriptors (Hopper's TMA).

A tile is a box of pixels of one image (rows by columns) by some output channels.  The box is read through a 4-D
descriptor of the NHWC map; for each of the nine taps the same box is read again, shifted by that tap, and the
descriptor fills in zeros outside the map: padding and tails of every axis cost no mask.  The product is
``weight [Cout, K] @ pixels [K, P]``: both operands then stay in shared memory, where a pixel operand on the left would
go through registers (compiled for sm_90).

The schedule is persistent: each program takes every n-th tile, where n is the number of programs, of one map or of all
levels of a pyramid.  The loops over tiles and over the sum are flattened into one, so that the loads of the next tile
are issued before the epilogue of this one, and the result is written by an asynchronous store.

Descriptors are made on the device, once per program and level.  Made on the host they would be encoded again at each
launch; made here they cost one small scratch buffer (`triton.scratch`), and one signature serves every chip: for sm_80
Triton lowers them to pointers, which the same alignments vectorise.
"""

# ruff: noqa: N803, N806 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="list-item, assignment"

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import (
    device_function,
    grid_dependency_wait,
    kernel,
    known_multiple,
    launch_dependents,
    loop_bound,
    operand,
    rounded,
    widened,
)

# Each of these pointers is a tuple with one entry per level.  Triton specialises on the numbers in a tuple, so numbers
# have names of their own, and are not specialised on.
POINTERS = ("features", "weights", "biases", "outs")
MAX_LEVELS = 5  # P2 to P6
SIZES = tuple(f"{side}{level}" for level in range(MAX_LEVELS) for side in ("height", "width"))
NUMBERS = (
    *("batch", "in_channels", "out_channels", "feature_n", "feature_c", "feature_y", "feature_x"),
    *("weight_o", "weight_columns", "bias_o", *SIZES),
)


@device_function
def _level_of(values, level, LEVELS: tl.constexpr):
    """One of a tuple of values by a run-time index."""
    value = values[0]
    for i in tl.static_range(1, LEVELS):
        value = tl.where(level == i, values[i], value)
    return value


@device_function
def _map_descriptor(
    base, batch, channels, height, width, n, c, y, x,
    INNER: tl.constexpr, ACCESS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A map [N, C, H, W] in boxes, its contiguous axis last; ACCESS elements divide that axis and all other strides."""
    base = tl.multiple_of(base, 16)
    n = known_multiple(n, ACCESS).to(tl.int64)
    y = known_multiple(y, ACCESS).to(tl.int64)
    if INNER == "channels":
        x = known_multiple(x, ACCESS).to(tl.int64)
        descriptor = tl.make_tensor_descriptor(
            base, [batch, height, width, channels], [n, y, x, 1], [1, ROWS, COLUMNS, CHANNELS]
        )
    else:
        c = known_multiple(c, ACCESS).to(tl.int64)
        width = known_multiple(width, ACCESS)
        descriptor = tl.make_tensor_descriptor(
            base, [batch, channels, height, width], [n, c, y, 1], [1, CHANNELS, ROWS, COLUMNS]
        )
    return descriptor


@kernel(NUMBERS)
def convolve(
    features, weights, biases, outs,
    batch, in_channels, out_channels, feature_n, feature_c, feature_y, feature_x,
    weight_o, weight_columns, bias_o,
    height0, width0, height1, width1, height2, width2, height3, width3, height4, width4,
    LEVELS: tl.constexpr, ARITHMETIC: tl.constexpr, ACCESS: tl.constexpr,
    OUT: tl.constexpr, BOXED: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    FOLLOWS: tl.constexpr, LEADS: tl.constexpr,
):  # fmt: skip
    """`OUT` is the axis along which the dense results are contiguous; `BOXED`: whether a descriptor can write them.

    A single feature may have any strides that a descriptor reads along its channels; several are dense NHWC maps.
    """
    launch_dependents(LEADS)
    PIXELS: tl.constexpr = ROWS * COLUMNS
    program, programs = tl.program_id(0), tl.num_programs(0)
    heights, widths = (height0, height1, height2, height3, height4), (width0, width1, width2, width3, width4)
    # Descriptors need no alignment beyond that of TMA; the pointers that they are lowered to for sm_80 do.
    in_channels = known_multiple(in_channels, ACCESS)
    if BOXED and OUT == "channels":
        out_channels = known_multiple(out_channels, ACCESS)
    steps_of_depth = (in_channels + DEPTH - 1) // DEPTH
    channel_tiles = (out_channels + CHANNELS - 1) // CHANNELS
    tiles_before = 0
    for level in range(LEVELS):
        bias, out = _level_of(biases, level, LEVELS), _level_of(outs, level, LEVELS)
        height, width = _level_of(heights, level, LEVELS), _level_of(widths, level, LEVELS)
        if BOXED and OUT == "pixels":
            width = known_multiple(width, ACCESS)
        if LEVELS > 1:
            feature_x = in_channels
            feature_y = width * feature_x
            feature_n = height * feature_y
        maps = _map_descriptor(
            _level_of(features, level, LEVELS), batch, in_channels, height, width,
            feature_n, feature_c, feature_y, feature_x, "channels", ACCESS, DEPTH, ROWS, COLUMNS,
        )  # fmt: skip
        matrix = tl.make_tensor_descriptor(
            tl.multiple_of(_level_of(weights, level, LEVELS), 16),
            [out_channels, known_multiple(weight_columns, ACCESS)],
            [known_multiple(weight_o, ACCESS).to(tl.int64), 1],
            [CHANNELS, DEPTH],
        )
        if OUT == "channels":
            out_c, out_x = 1, out_channels
            out_y = width * out_x
            out_n = widened(height, WIDE) * out_y
        else:
            out_x, out_y = 1, width
            out_c = height * out_y
            out_n = widened(out_channels, WIDE) * out_c
        if BOXED:
            results = _map_descriptor(
                out, batch, out_channels, height, width,
                out_n, out_c, out_y, out_x, OUT, ACCESS, CHANNELS, ROWS, COLUMNS,
            )  # fmt: skip
        row_tiles, column_tiles = (height + ROWS - 1) // ROWS, (width + COLUMNS - 1) // COLUMNS
        tiles = batch * row_tiles * column_tiles * channel_tiles
        # Tiles are counted through all levels; this is the program's first tile of this level.
        first = program - tiles_before % programs
        first = tl.where(first < 0, first + programs, first)
        tiles_before += tiles
        for tile in tl.range(loop_bound(first), loop_bound(tiles), loop_bound(programs), flatten=True):
            box = tile // channel_tiles
            start = (tile - box * channel_tiles) * CHANNELS
            row_of_boxes = box // column_tiles
            x_first = (box - row_of_boxes * column_tiles) * COLUMNS
            n = row_of_boxes // row_tiles
            y_first = (row_of_boxes - n * row_tiles) * ROWS
            if ARITHMETIC == "tf32":
                total = tl.zeros([PIXELS, CHANNELS], tl.float32)
            else:
                total = tl.zeros([CHANNELS, PIXELS], tl.float32)
            for step in range(loop_bound(9 * steps_of_depth)):
                # All taps of some channels, then the next channels: the nine boxes overlap, and are in L2.
                chunk = step // 9
                tap = step - chunk * 9
                y, x = y_first, x_first
                y += tap // 3 - 1
                x += tap % 3 - 1
                left = matrix.load([start, (tap * steps_of_depth + chunk) * DEPTH])
                right = tl.reshape(maps.load([n, y, x, chunk * DEPTH]), [PIXELS, DEPTH]).T
                if ARITHMETIC == "tf32":
                    # The pixels are rounded to TF32 on their way through registers; `pack` has rounded the weight.
                    total = tl.dot(operand(right.T, ARITHMETIC), operand(left, "packed").T, total)
                elif ARITHMETIC == "ieee":
                    total = tl.dot(left, right, total, input_precision="ieee")
                else:
                    total = tl.dot(operand(left, ARITHMETIC), operand(right, ARITHMETIC), total)
            if ARITHMETIC == "tf32":
                total = total.T
            grid_dependency_wait(FOLLOWS)
            c = start + tl.arange(0, CHANNELS)
            if BIAS:
                addend = tl.load(bias + c * bias_o, mask=c < out_channels, other=0.0)
                total += addend.to(tl.float32)[:, None]
            result = rounded(total, out.dtype.element_ty)
            if not BOXED:
                pixel = tl.arange(0, PIXELS)
                y = y_first + pixel // COLUMNS
                x = x_first + pixel % COLUMNS
                inside = ((y < height) & (x < width))[None, :] & (c < out_channels)[:, None]
                place = widened(n, WIDE) * out_n + widened(y, WIDE) * out_y + widened(x, WIDE) * out_x
                place = place[None, :] + (widened(c, WIDE) * out_c)[:, None]
                tl.store(out + place, result, mask=inside)
            elif OUT == "channels":
                results.store([n, y_first, x_first, start], tl.reshape(result.T, [1, ROWS, COLUMNS, CHANNELS]))
            else:
                results.store([n, start, y_first, x_first], tl.reshape(result, [1, CHANNELS, ROWS, COLUMNS]))


@kernel(["in_channels", "out_channels", "weight_o", "weight_i", "weight_y", "weight_x", "padded"])
def pack(
    weights, packed, in_channels, out_channels, weight_o, weight_i, weight_y, weight_x, padded,
    LEVELS: tl.constexpr, ARITHMETIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """packed[level, o, tap, i] = weights[level][o, i, tap], zeros after the last input channel; TF32 is rounded."""
    level = tl.program_id(2)
    padded = known_multiple(padded, 16)
    tap = tl.program_id(0) % 9
    row = (tl.program_id(0) // 9) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tap // 3
    place = (row * weight_o + y * weight_y + (tap - y * 3) * weight_x)[:, None] + (column * weight_i)[None, :]
    inside = (row < out_channels)[:, None]
    weight = _level_of(weights, level, LEVELS)
    value = tl.load(weight + place, mask=inside & (column < in_channels)[None, :], other=0.0)
    if ARITHMETIC == "tf32":
        value = operand(value, ARITHMETIC)
    place = (((level * out_channels + row) * 9 + tap) * padded)[:, None] + column[None, :]
    tl.store(packed + place, value, mask=inside & (column < padded)[None, :])
