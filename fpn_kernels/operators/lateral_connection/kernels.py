"""The device code of `lateral_connection`: one tile of the product, and its epilogue."""

# ruff: noqa: N803, N806, SIM108 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import (
    along,
    device_function,
    grid_dependency_wait,
    kernel,
    known_multiple,
    launch_dependents,
    loop_bound,
    nearest_source,
    operand,
    rounded,
    widened,
)

_RUN_TIME = [
    *("in_channels", "out_channels", "height", "width", "top_height", "top_width"),
    *("feature_n", "feature_c", "feature_y", "feature_x", "weight_o", "weight_i", "bias_o"),
    *("top_n", "top_c", "top_y", "top_x", "out_n", "out_c", "out_p"),
    *("pixel_tiles", "channel_tiles"),
]


@device_function
def _by_pixel(values, PIXELS_LAST: tl.constexpr):
    """A value to a pixel, shaped to broadcast over the tile."""
    if PIXELS_LAST:
        shaped = values[None, :]
    else:
        shaped = values[:, None]
    return shaped


@device_function
def _by_channel(values, PIXELS_LAST: tl.constexpr):
    """A value to an output channel, shaped to broadcast over the tile."""
    if PIXELS_LAST:
        shaped = values[:, None]
    else:
        shaped = values[None, :]
    return shaped


@kernel(_RUN_TIME)
def connect(
    feature, weight, bias, top, out, gain, scale_y, scale_x,
    in_channels, out_channels, height, width, top_height, top_width,
    feature_n, feature_c, feature_y, feature_x,
    weight_o, weight_i, bias_o,
    top_n, top_c, top_y, top_x,
    out_n, out_c, out_p,
    pixel_tiles, channel_tiles,
    MODE: tl.constexpr, HAS_TOP: tl.constexpr, DOUBLED: tl.constexpr,
    ARITHMETIC: tl.constexpr, PIXELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    FEATURE_CHANNELS: tl.constexpr, FEATURE_PIXELS: tl.constexpr,
    WEIGHT_IN: tl.constexpr, WEIGHT_OUT: tl.constexpr,
    BIAS: tl.constexpr, TOP: tl.constexpr, OUT: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    FOLLOWS: tl.constexpr, LEADS: tl.constexpr,
):  # fmt: skip
    launch_dependents(LEADS)
    program = tl.program_id(0)
    channel_tile = program % channel_tiles
    pixel_tile = (program // channel_tiles) % pixel_tiles
    n = (program // channel_tiles) // pixel_tiles
    pixel = pixel_tile * PIXELS + tl.arange(0, PIXELS)
    y = pixel // width
    x = pixel - y * width
    c = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, DEPTH)
    pixels = known_multiple(height * width, FEATURE_PIXELS)
    out_channels = known_multiple(out_channels, WEIGHT_OUT)
    if not DOUBLED:
        out_channels = known_multiple(out_channels, TOP)
    in_channels = known_multiple(known_multiple(in_channels, FEATURE_CHANNELS), WEIGHT_IN)
    if PIXELS_LAST:
        pixels = known_multiple(pixels, OUT)
    else:
        out_channels = known_multiple(out_channels, OUT)
    pixel_inside = pixel < pixels
    channel_inside = c < out_channels

    FEATURE: tl.constexpr = FEATURE_CHANNELS if FEATURE_CHANNELS > 0 else FEATURE_PIXELS
    if FLAT:
        feature_pixel = along(widened(pixel, WIDE), known_multiple(feature_x, FEATURE_CHANNELS), FEATURE_PIXELS)
    else:
        feature_pixel = widened(y, WIDE) * known_multiple(feature_y, FEATURE_CHANNELS)
        feature_pixel += widened(x, WIDE) * known_multiple(feature_x, FEATURE_CHANNELS)
    depth_stride = known_multiple(feature_c, FEATURE_PIXELS)
    feature_start = feature + widened(n, WIDE) * known_multiple(feature_n, FEATURE)
    weight_channel = along(widened(c, WIDE), known_multiple(weight_o, WEIGHT_IN), WEIGHT_OUT)
    weight_stride = known_multiple(weight_i, WEIGHT_OUT)

    if PIXELS_LAST:
        total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    else:
        total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for first in range(0, loop_bound(in_channels), DEPTH):
        step = first + k
        step_inside = step < in_channels
        feature_step = along(widened(step, WIDE), depth_stride, FEATURE_CHANNELS)
        weight_step = along(widened(step, WIDE), weight_stride, WEIGHT_IN)
        # Input channels are the columns of the first operand and the rows of the second.
        if PIXELS_LAST:
            left_place = weight + (weight_channel[:, None] + weight_step[None, :])
            right_place = feature_start + (feature_step[:, None] + feature_pixel[None, :])
            left = tl.load(left_place, mask=channel_inside[:, None] & step_inside[None, :], other=0.0)
            right = tl.load(right_place, mask=step_inside[:, None] & pixel_inside[None, :], other=0.0)
        else:
            left_place = feature_start + (feature_pixel[:, None] + feature_step[None, :])
            right_place = weight + (weight_step[:, None] + weight_channel[None, :])
            left = tl.load(left_place, mask=pixel_inside[:, None] & step_inside[None, :], other=0.0)
            right = tl.load(right_place, mask=step_inside[:, None] & channel_inside[None, :], other=0.0)
        left, right = operand(left, ARITHMETIC), operand(right, ARITHMETIC)
        if ARITHMETIC == "ieee":
            total = tl.dot(left, right, total, input_precision="ieee")
        else:
            total = tl.dot(left, right, total, input_precision="tf32")

    inside = _by_pixel(pixel_inside, PIXELS_LAST) & _by_channel(channel_inside, PIXELS_LAST)
    if BIAS is not None:
        addend = tl.load(bias + along(widened(c, WIDE), bias_o, BIAS), mask=channel_inside, other=0.0).to(tl.float32)
        total += _by_channel(addend, PIXELS_LAST)
    grid_dependency_wait(FOLLOWS)
    top_start = top + widened(n, WIDE) * known_multiple(top_n, TOP)
    if HAS_TOP and DOUBLED:
        # A coarse pixel for each pair of fine ones, which lie in one row: the width is even.
        columns = known_multiple(top_width, TOP)
        pair = pixel_tile * (PIXELS // 2) + tl.arange(0, PIXELS // 2)
        row = pair // columns
        top_pixel = widened(row // 2, WIDE) * known_multiple(top_y, TOP)
        top_pixel += along(widened(pair - row * columns, WIDE), top_x, TOP)
        top_channel = widened(c, WIDE) * known_multiple(top_c, TOP)
        pairs_inside = channel_inside[:, None] & (pair < height * columns)[None, :]
        coarse = tl.load(top_start + (top_channel[:, None] + top_pixel[None, :]), mask=pairs_inside, other=0.0)
        total = gain * (total + tl.interleave(coarse, coarse).to(tl.float32))
    elif HAS_TOP:
        source_y = nearest_source(y, scale_y, top_height, MODE)
        source_x = nearest_source(x, scale_x, top_width, MODE)
        top_pixel = widened(source_y, WIDE) * known_multiple(top_y, TOP)
        top_pixel += widened(source_x, WIDE) * known_multiple(top_x, TOP)
        top_channel = along(widened(c, WIDE), top_c, TOP)
        place = _by_pixel(top_pixel, PIXELS_LAST) + _by_channel(top_channel, PIXELS_LAST)
        coarse = tl.load(top_start + place, mask=inside, other=0.0)
        total = gain * (total + coarse.to(tl.float32))
    out_start = out + widened(n, WIDE) * known_multiple(out_n, OUT)
    if PIXELS_LAST:
        out_pixel = along(widened(pixel, WIDE), out_p, OUT)
        out_channel = widened(c, WIDE) * known_multiple(out_c, OUT)
    else:
        out_pixel = widened(pixel, WIDE) * known_multiple(out_p, OUT)
        out_channel = along(widened(c, WIDE), out_c, OUT)
    place = _by_pixel(out_pixel, PIXELS_LAST) + _by_channel(out_channel, PIXELS_LAST)
    tl.store(out_start + place, rounded(total, out.dtype.element_ty), mask=inside)
