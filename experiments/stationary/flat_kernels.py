"""`stationary.kernels` for maps in NCHW, and for coarser maps of any size.  Device code, in Gluon, for Hopper.

A tile is PIXELS consecutive pixels of an image, across its rows, so that a bulk copy reads them along either axis: by
channels (NHWC) or by pixels (NCHW), and tensor cores take both orders.  The accumulator is [pixels, channels] for a
result in NHWC and [channels, pixels] for one in NCHW.  Coarse pixels are gathered by their addresses while the products
run; at half the size in NCHW, one per pair of fine pixels, which lie in one row.

The roles of the warps and the ring of chunks are the same as there.
"""

# ruff: noqa: N803, N806, RUF005, SIM108 - Gluon's idiom: constexprs in capitals, no stars, a branch for each

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from experiments.stationary.kernels import GROUPS, LOADING, MULTIPLYING, barriers_of, load_weight

_NUMBERS = (
    *("batch", "in_channels", "out_channels", "pixels", "width", "top_height", "top_width"),
    *("feature_n", "feature_row", "weight_row", "top_n", "top_c", "top_y", "top_x", "out_n", "out_row"),
    *("tiles", "tiles_of_image", "channel_tiles"),
)


@gluon.jit
def source_of(index, scale, size, MODE: gl.constexpr):
    """The coarse pixel of a fine pixel along an axis: `indexing.nearest_source`, in Gluon."""
    if MODE == "nearest-exact":
        position = (index.to(gl.float32) + 0.5) * scale
    else:
        position = index.to(gl.float32) * scale
    return gl.minimum(position.to(gl.int32), size - 1)


@gluon.jit
def load_features(
    feature, weight, features, weights, barriers, shape, strides, weight_row, out_channels, channel, schedule,
    FEATURE: gl.constexpr, PIXELS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    batch, pixels, in_channels = shape
    n_stride, row_stride = strides
    weight_full, full, free, _ = barriers
    first, step, tiles, tiles_of_image = schedule
    BYTES: gl.constexpr = PIXELS * DEPTH * feature.dtype.element_ty.primitive_bitwidth // 8
    load_weight(
        weight,
        weights,
        weight_full,
        in_channels,
        out_channels,
        weight_row,
        channel,
        CHANNELS,
        DEPTH,
        CHUNKS,
        TRANSPOSED,
    )
    if FEATURE == "channels":
        maps = tma.make_tensor_descriptor(
            feature, [batch, pixels, in_channels], [n_stride, row_stride, 1], [1, PIXELS, DEPTH], features.layout
        )
    else:
        maps = tma.make_tensor_descriptor(
            feature, [batch, in_channels, pixels], [n_stride, row_stride, 1], [1, DEPTH, PIXELS], features.layout
        )
    chunk = 0
    for tile in range(first, tiles, step):
        n = tile // tiles_of_image
        p = (tile - n * tiles_of_image) * PIXELS
        for k in gl.static_range(CHUNKS):
            slot = chunk % STAGES
            mbarrier.wait(free.index(slot), (chunk // STAGES + 1) & 1)
            mbarrier.expect(full.index(slot), BYTES)
            if FEATURE == "channels":
                tma.async_copy_global_to_shared(maps, [n, p, k * DEPTH], full.index(slot), features.index(slot))
            else:
                tma.async_copy_global_to_shared(maps, [n, k * DEPTH, p], full.index(slot), features.index(slot))
            chunk += 1


@gluon.jit
def gather(
    top, n, p, channel, shape, strides, scales, pixels, width,
    OUT: gl.constexpr, MODE: gl.constexpr, DOUBLED: gl.constexpr,
    PIXELS: gl.constexpr, CHANNELS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The coarse pixels of a tile of whole channels: one per fine pixel or, DOUBLED, one per pair."""
    SHARE: gl.constexpr = 2 if DOUBLED else 1
    height, top_width = shape
    n_stride, c_stride, y_stride, x_stride = strides
    scale_y, scale_x = scales
    if OUT == "channels":
        place = p + gl.arange(0, PIXELS, gl.SliceLayout(1, LAYOUT))
        c = channel + gl.arange(0, CHANNELS, gl.SliceLayout(0, LAYOUT))
    else:
        place = p // SHARE + gl.arange(0, PIXELS // SHARE, gl.SliceLayout(0, LAYOUT))
        c = channel + gl.arange(0, CHANNELS, gl.SliceLayout(1, LAYOUT))
    # Beyond the image the last pixel is read again, without a mask; the bulk copy does not write those results.
    place = gl.minimum(place, pixels // SHARE - 1)
    if DOUBLED:
        y = place // top_width
        offset = y // 2 * y_stride + (place - y * top_width) * x_stride
    else:
        y = place // width
        source_x = source_of(place - y * width, scale_x, top_width, MODE)
        if OUT == "channels":
            # Multiples of 16 bytes, as for a descriptor: two neighbouring channels of a thread are one access.
            y_stride = y_stride // 8 * 8
            x_stride = x_stride // 8 * 8
            n_stride = n_stride // 8 * 8
        offset = source_of(y, scale_y, height, MODE) * y_stride + source_x * x_stride
    if OUT == "channels":
        places = offset[:, None] + c[None, :]
    else:
        places = offset[None, :] + (c * c_stride)[:, None]
    return gl.load(top + n * n_stride + places)


@gluon.jit
def slot_of_result(features, slot, ALIKE: gl.constexpr, PART: gl.constexpr, LAYOUT: gl.constexpr):
    """A slot of the ring as a part of the result, whose contiguous axis may differ from that of the pixels."""
    part = features.index(slot)
    if not ALIKE:
        part = part._reinterpret(features.dtype, PART, LAYOUT)
    return part


@gluon.jit
def multiply(
    result, top, bias, gain, features, weights, barriers, channel, schedule,
    GROUP: gl.constexpr, FEATURE: gl.constexpr, OUT: gl.constexpr, MODE: gl.constexpr, DOUBLED: gl.constexpr,
    PIXELS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, HAS_TOP: gl.constexpr, FOLLOWS: gl.constexpr,
):  # fmt: skip
    out, batch, pixels, width, out_channels, n_stride, row_stride = result
    top_start, top_shape, top_strides, scales = top
    weight_full, full, free, turns = barriers
    first, step, tiles, tiles_of_image = schedule
    DTYPE: gl.constexpr = out.dtype.element_ty
    PARTS: gl.constexpr = CHANNELS // DEPTH
    if OUT == "channels":
        ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, CHANNELS, 16]
        )
        SHAPE: gl.constexpr = [PIXELS, CHANNELS]
        PART: gl.constexpr = [1, PIXELS, DEPTH]
        PART_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, PIXELS, DEPTH], DTYPE)
        maps = tma.make_tensor_descriptor(
            out, [batch, pixels, out_channels], [n_stride, row_stride, 1], PART, PART_LAYOUT
        )
        c = channel + gl.arange(0, CHANNELS, gl.SliceLayout(0, ACCUMULATOR))
        inside = c < out_channels // 8 * 8
    else:
        ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIXELS, 16]
        )
        SHAPE: gl.constexpr = [CHANNELS, PIXELS]
        PART: gl.constexpr = [1, DEPTH, PIXELS]
        PART_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, DEPTH, PIXELS], DTYPE)
        maps = tma.make_tensor_descriptor(
            out, [batch, out_channels, pixels], [n_stride, row_stride, 1], PART, PART_LAYOUT
        )
        c = channel + gl.arange(0, CHANNELS, gl.SliceLayout(1, ACCUMULATOR))
        inside = c < out_channels
    for k in gl.static_range(CHUNKS):
        mbarrier.wait(weight_full.index(k), 0)
    count = GROUP
    for tile in range(first + GROUP * step, tiles, GROUPS * step):
        n = tile // tiles_of_image
        p = (tile - n * tiles_of_image) * PIXELS
        total = gl.zeros(SHAPE, gl.float32, ACCUMULATOR)
        if BIAS:
            addend = gl.load(bias + c, mask=inside, other=0.0).to(gl.float32)
            if OUT == "channels":
                total += addend[None, :]
            else:
                total += addend[:, None]
        begin = count * CHUNKS
        mbarrier.wait(turns.index(GROUP), (count // GROUPS + 1 - GROUP) & 1)
        for k in gl.static_range(CHUNKS):
            slot = (begin + k) % STAGES
            mbarrier.wait(full.index(slot), ((begin + k) // STAGES) & 1)
            # The pixels are [pixels, DEPTH] or [DEPTH, pixels], the weight [channels, DEPTH] or [DEPTH, channels].
            if FEATURE == "channels":
                some = features.index(slot).reshape([PIXELS, DEPTH])
            else:
                some = features.index(slot).reshape([DEPTH, PIXELS])
            panel = weights.index(k)
            if OUT == "channels":
                left = some if FEATURE == "channels" else some.permute((1, 0))
                right = panel if TRANSPOSED else panel.permute((1, 0))
            else:
                left = panel.permute((1, 0)) if TRANSPOSED else panel
                right = some.permute((1, 0)) if FEATURE == "channels" else some
            total = warpgroup_mma(left, right, total, is_async=True)
            if k > 0 and k <= CHUNKS - PARTS:
                total = warpgroup_mma_wait(1, deps=[total])
                mbarrier.arrive(free.index((begin + k - 1) % STAGES), count=1)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        if FOLLOWS:
            # Coarse pixels are read, and results written, after this wait; after the first one it does nothing.
            gdc_wait()
        total = warpgroup_mma_wait(0, deps=[total])
        if HAS_TOP:
            if DOUBLED:
                PAIRS: gl.constexpr = (
                    gl.zeros(SHAPE, gl.float32, ACCUMULATOR).reshape([CHANNELS, PIXELS // 2, 2]).type.layout
                )
                COARSE: gl.constexpr = gl.SliceLayout(2, PAIRS)
            else:
                COARSE: gl.constexpr = ACCUMULATOR
            coarse = gather(
                top_start, n, p, channel, top_shape, top_strides, scales, pixels, width,
                OUT, MODE, DOUBLED, PIXELS, CHANNELS, COARSE,
            )  # fmt: skip
            if DOUBLED:
                pairs = total.reshape([CHANNELS, PIXELS // 2, 2])
                total = (gain * (pairs + coarse.to(gl.float32).expand_dims(2))).reshape(SHAPE)
            else:
                total = gain * (total + coarse.to(gl.float32))
        merged = total.to(DTYPE)
        last = (begin + CHUNKS - 1) % STAGES
        last_slot = slot_of_result(features, last, FEATURE == OUT, PART, PART_LAYOUT)
        if PARTS == 1:
            last_slot.store(merged.reshape(PART))
            fence_async_shared()
            if OUT == "channels":
                tma.async_copy_shared_to_global(maps, [n, p, channel], last_slot)
            else:
                tma.async_copy_shared_to_global(maps, [n, channel, p], last_slot)
            tma.store_wait(0)
        else:
            before = (begin + CHUNKS - 2) % STAGES
            slot_before = slot_of_result(features, before, FEATURE == OUT, PART, PART_LAYOUT)
            if OUT == "channels":
                halves = merged.reshape([1, PIXELS, 2, DEPTH]).permute((0, 1, 3, 2)).split()
            else:
                halves = merged.reshape([1, 2, DEPTH, PIXELS]).permute((0, 2, 3, 1)).split()
            slot_before.store(halves[0])
            last_slot.store(halves[1])
            fence_async_shared()
            if OUT == "channels":
                tma.async_copy_shared_to_global(maps, [n, p, channel], slot_before)
                tma.async_copy_shared_to_global(maps, [n, p, channel + DEPTH], last_slot)
            else:
                tma.async_copy_shared_to_global(maps, [n, channel, p], slot_before)
                tma.async_copy_shared_to_global(maps, [n, channel + DEPTH, p], last_slot)
            tma.store_wait(0)
            mbarrier.arrive(free.index(before), count=1)
        mbarrier.arrive(free.index(last), count=1)
        count += GROUPS


@gluon.jit(do_not_specialize=_NUMBERS)
def connect(
    feature, weight, bias, top, out, gain, scale_y, scale_x,
    batch, in_channels, out_channels, pixels, width, top_height, top_width,
    feature_n, feature_row, weight_row, top_n, top_c, top_y, top_x, out_n, out_row,
    tiles, tiles_of_image, channel_tiles,
    FEATURE: gl.constexpr, OUT: gl.constexpr, MODE: gl.constexpr, DOUBLED: gl.constexpr,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, HAS_TOP: gl.constexpr,
    PIXELS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    FOLLOWS: gl.constexpr, LEADS: gl.constexpr,
):  # fmt: skip
    """FEATURE and OUT are axes of `geometry.inner_axis`, along which the maps are contiguous."""
    if LEADS:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = feature.dtype.element_ty
    CHUNK: gl.constexpr = [1, PIXELS, DEPTH] if FEATURE == "channels" else [1, DEPTH, PIXELS]
    PANEL: gl.constexpr = [DEPTH, CHANNELS] if TRANSPOSED else [CHANNELS, DEPTH]
    features = gl.allocate_shared_memory(DTYPE, [STAGES] + CHUNK, gl.NVMMASharedLayout.get_default_for(CHUNK, DTYPE))
    weights = gl.allocate_shared_memory(DTYPE, [CHUNKS] + PANEL, gl.NVMMASharedLayout.get_default_for(PANEL, DTYPE))
    barriers = barriers_of(CHUNKS), barriers_of(STAGES), barriers_of(STAGES), barriers_of(GROUPS)
    program = gl.program_id(0)
    channel = program % channel_tiles * CHANNELS
    schedule = program // channel_tiles, gl.num_programs(0) // channel_tiles, tiles, tiles_of_image
    result = (out, batch, pixels, width, out_channels, out_n, out_row)
    coarser = (top, (top_height, top_width), (top_n, top_c, top_y, top_x), (scale_y, scale_x))
    shape, strides = (batch, pixels, in_channels), (feature_n, feature_row)
    # The arguments are spelled out per group: a constexpr assigned to a variable is no constexpr any more.
    gl.warp_specialize([
        (multiply, (
            result, coarser, bias, gain, features, weights, barriers, channel, schedule,
            0, FEATURE, OUT, MODE, DOUBLED, PIXELS, CHANNELS, DEPTH, CHUNKS, STAGES, TRANSPOSED, BIAS, HAS_TOP, FOLLOWS,
        )),
        (multiply, (
            result, coarser, bias, gain, features, weights, barriers, channel, schedule,
            1, FEATURE, OUT, MODE, DOUBLED, PIXELS, CHANNELS, DEPTH, CHUNKS, STAGES, TRANSPOSED, BIAS, HAS_TOP, FOLLOWS,
        )),
        (load_features, (
            feature, weight, features, weights, barriers, shape, strides, weight_row, out_channels, channel, schedule,
            FEATURE, PIXELS, CHANNELS, DEPTH, CHUNKS, STAGES, TRANSPOSED,
        )),
    ], [4, 1], [MULTIPLYING, LOADING])  # fmt: skip
