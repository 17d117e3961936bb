"""A 1x1 convolution with an optional coarser map, over tensor descriptors (Hopper's TMA).  Device code.

A tile is a box of pixels of one image (rows by columns) by some output channels.  The box is read through a 4-D
descriptor of the map, which fills in zeros outside the map: tails of every axis need no mask.  The product is
``weight [Cout, Cin] @ pixels [Cin, P]``: both operands then stay in shared memory, where a pixel operand on the left
would go through registers (compiled for sm_90).

The schedule is persistent: each program takes every n-th tile, where n is the number of programs.  The loops over tiles
and over the sum are flattened into one, so that the loads of the next tile are issued before the epilogue of this one,
and the result is written by an asynchronous store.

Descriptors are made on the device, once per program, in a small scratch buffer.  For sm_80 Triton lowers them to
pointers, which the same alignments vectorise.
"""

# ruff: noqa: N803, N806, SIM108 - Triton's idiom: constexprs in capitals, and a branch for each

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import (
    along,
    device_function,
    kernel,
    known_multiple,
    loop_bound,
    nearest_source,
    operand,
    rounded,
    widened,
)

_NUMBERS = (
    *("batch", "in_channels", "out_channels", "height", "width", "feature_n", "feature_c", "feature_y", "feature_x"),
    *("weight_o", "weight_columns", "bias_o", "top_height", "top_width", "top_n", "top_c", "top_y", "top_x"),
)


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


@device_function
def _read_box(
    descriptor, n, c, y, x,
    INNER: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A box of a map as [CHANNELS, ROWS * COLUMNS]."""
    if INNER == "channels":
        box = tl.reshape(descriptor.load([n, y, x, c]), [ROWS * COLUMNS, CHANNELS]).T
    else:
        box = tl.reshape(descriptor.load([n, c, y, x]), [CHANNELS, ROWS * COLUMNS])
    return box


@device_function
def _doubled(box, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A box of coarse pixels [CHANNELS, ROWS/2 * COLUMNS/2], each copied to its four fine pixels."""
    box = tl.reshape(box, [CHANNELS, ROWS // 2, 1, COLUMNS // 2, 1])
    box = tl.broadcast_to(box, [CHANNELS, ROWS // 2, 2, COLUMNS // 2, 2])
    return tl.reshape(box, [CHANNELS, ROWS * COLUMNS])


@kernel(_NUMBERS)
def connect(
    feature, weight, bias, top, out, gain, scale_y, scale_x,
    batch, in_channels, out_channels, height, width, feature_n, feature_c, feature_y, feature_x,
    weight_o, weight_columns, bias_o, top_height, top_width, top_n, top_c, top_y, top_x,
    MODE: tl.constexpr, ARITHMETIC: tl.constexpr, ACCESS: tl.constexpr,
    FEATURE: tl.constexpr, TOP: tl.constexpr, TOP_CHANNELS: tl.constexpr,
    OUT: tl.constexpr, BOXED: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`FEATURE` and `TOP` are axes of `geometry.inner_axis`; `TOP` is also "gather" or None.

    `OUT` is the axis along which the dense result is contiguous; `BOXED`: whether a descriptor can write it.
    """
    PIXELS: tl.constexpr = ROWS * COLUMNS
    PART: tl.constexpr = CHANNELS // PARTS
    program, programs = tl.program_id(0), tl.num_programs(0)
    # Descriptors need no alignment beyond that of TMA; the pointers that they are lowered to for sm_80 do.
    if FEATURE == "channels":
        in_channels = known_multiple(in_channels, ACCESS)
    if (BOXED and OUT == "channels") or TOP == "channels":
        out_channels = known_multiple(out_channels, ACCESS)
    if FEATURE == "pixels" or (BOXED and OUT == "pixels"):
        width = known_multiple(width, ACCESS)
    maps = _map_descriptor(
        feature, batch, in_channels, height, width,
        feature_n, feature_c, feature_y, feature_x, FEATURE, ACCESS, DEPTH, ROWS, COLUMNS,
    )  # fmt: skip
    matrix = tl.make_tensor_descriptor(
        tl.multiple_of(weight, 16),
        [out_channels, known_multiple(weight_columns, ACCESS)],
        [known_multiple(weight_o, ACCESS).to(tl.int64), 1],
        [CHANNELS, DEPTH],
    )
    if TOP == "channels" or TOP == "pixels":
        coarse_maps = _map_descriptor(
            top, batch, out_channels, top_height, top_width,
            top_n, top_c, top_y, top_x, TOP, ACCESS, PART, ROWS // 2, COLUMNS // 2,
        )  # fmt: skip
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
            out, batch, out_channels, height, width, out_n, out_c, out_y, out_x, OUT, ACCESS, PART, ROWS, COLUMNS
        )
    channel_tiles = (out_channels + CHANNELS - 1) // CHANNELS
    row_tiles, column_tiles = (height + ROWS - 1) // ROWS, (width + COLUMNS - 1) // COLUMNS
    tiles = batch * row_tiles * column_tiles * channel_tiles
    for tile in tl.range(loop_bound(program), loop_bound(tiles), loop_bound(programs), flatten=True):
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
        for step in range(loop_bound((in_channels + DEPTH - 1) // DEPTH)):
            left = matrix.load([start, step * DEPTH])
            right = _read_box(maps, n, step * DEPTH, y_first, x_first, FEATURE, DEPTH, ROWS, COLUMNS)
            if ARITHMETIC == "tf32":
                # The pixels are rounded to TF32 on their way through registers; `pack` has rounded the weight.
                total = tl.dot(operand(right.T, ARITHMETIC), operand(left, "packed").T, total)
            elif ARITHMETIC == "ieee":
                total = tl.dot(left, right, total, input_precision="ieee")
            else:
                total = tl.dot(operand(left, ARITHMETIC), operand(right, ARITHMETIC), total)
        if ARITHMETIC == "tf32":
            total = total.T
        pixel = tl.arange(0, PIXELS)
        y = y_first + pixel // COLUMNS
        x = x_first + pixel % COLUMNS
        pixel_inside = ((y < height) & (x < width))[None, :]
        if PARTS == 2:
            halves = tl.split(tl.permute(tl.reshape(total, [2, PART, PIXELS]), [1, 2, 0]))
        else:
            halves = (total,)
        for part in tl.static_range(PARTS):
            value = halves[part]
            c_first = start + part * PART
            c = c_first + tl.arange(0, PART)
            if BIAS:
                addend = tl.load(bias + c * bias_o, mask=c < out_channels, other=0.0)
                value += addend.to(tl.float32)[:, None]
            if TOP == "channels" or TOP == "pixels":
                coarse = _read_box(
                    coarse_maps, n, c_first, y_first // 2, x_first // 2, TOP, PART, ROWS // 2, COLUMNS // 2
                )
                value = gain * (value + _doubled(coarse, PART, ROWS, COLUMNS).to(tl.float32))
            elif TOP == "gather":
                source_y = nearest_source(y, scale_y, top_height, MODE)
                source_x = nearest_source(x, scale_x, top_width, MODE)
                place = widened(source_y, WIDE) * known_multiple(top_y, TOP_CHANNELS)
                place += widened(source_x, WIDE) * known_multiple(top_x, TOP_CHANNELS)
                place += widened(n, WIDE) * known_multiple(top_n, TOP_CHANNELS)
                place = place[None, :] + along(widened(c, WIDE), top_c, TOP_CHANNELS)[:, None]
                channel_inside = c < known_multiple(out_channels, TOP_CHANNELS)
                coarse = tl.load(top + place, mask=pixel_inside & channel_inside[:, None], other=0.0)
                value = gain * (value + coarse.to(tl.float32))
            result = rounded(value, out.dtype.element_ty)
            if not BOXED:
                place = widened(n, WIDE) * out_n + widened(y, WIDE) * out_y + widened(x, WIDE) * out_x
                place = place[None, :] + (widened(c, WIDE) * out_c)[:, None]
                tl.store(out + place, result, mask=pixel_inside & (c < out_channels)[:, None])
            elif OUT == "channels":
                results.store([n, y_first, x_first, c_first], tl.reshape(result.T, [1, ROWS, COLUMNS, PART]))
            else:
                results.store([n, c_first, y_first, x_first], tl.reshape(result, [1, PART, ROWS, COLUMNS]))


@kernel(["in_channels", "out_channels", "weight_o", "weight_i", "padded"])
def pack(
    weight, packed, in_channels, out_channels, weight_o, weight_i, padded,
    ARITHMETIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """packed[o, i] = weight[o, i], with zeros after the last input channel; for TF32, rounded to TF32."""
    padded = known_multiple(padded, 16)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < out_channels)[:, None]
    place = (row * weight_o)[:, None] + (column * weight_i)[None, :]
    value = tl.load(weight + place, mask=inside & (column < in_channels)[None, :], other=0.0)
    if ARITHMETIC == "tf32":
        value = operand(value, ARITHMETIC)
    place = (row * padded)[:, None] + column[None, :]
    tl.store(packed + place, value, mask=inside & (column < padded)[None, :])
