"""A 1x1 convolution whose weight stays in shared memory while the pixels stream past it, for Hopper.  Device code.

Written in Gluon, Triton's lower-level language, in which groups of warps have roles.  Two groups of four warps multiply
and write, each one tile in turn; one warp loads features and one loads coarse pixels:

    loader of features   W W f0 f0 f1 f1 f2 f2 f3 f3 ...       W: the weight, once per program
    loader of tops             t0    t1    t2    t3 ...
    first group                == tile 0 =+out  == tile 2 =+out    =: product
    second group                     == tile 1 =+out  == tile 3 =+out

So copies never wait for a product, and the epilogue of one group overlaps the product of the other.  The pixels of a
tile are read once, by a box of a tensor descriptor, and so are its coarse pixels, a quarter as many.  The result
overwrites the tile's pixels in shared memory, and one more bulk copy writes it to global memory.

Chunks (the pixels of a tile by DEPTH input channels) use the STAGES slots of a ring in turn.  Each slot has two
barriers, `full` and `free`.  A chunk that is the c-th user of its slot waits for the c-th phase of the barrier.  A wait
only sees the parity of a phase, so a warp may wait for a phase only if it knows that the previous phase is over.  The
loader has waited for that phase itself.  A group relies on the other group: `turns` lets a group continue when the
other one has waited for all chunks of its own tile.

The weight is [Cout, Cin], or, TRANSPOSED, [Cin, Cout] as in the gradient of the feature: tensor cores take either.

Each descriptor is made by the warps that use it, which therefore see it as it was written.
"""

# ruff: noqa: N803, N806, RUF005, SIM113 - Gluon's idiom: constexprs in capitals, no stars, no enumerate

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

_NUMBERS = (
    *("batch", "in_channels", "out_channels", "height", "width", "top_height", "top_width"),
    *("feature_n", "feature_y", "feature_x", "weight_row"),
    *("top_n", "top_y", "top_x", "out_n", "out_y", "out_x"),
    *("tiles", "tiles_y", "tiles_x", "channel_tiles"),
)

# The groups of warps that multiply, and the registers per thread of those and of the loaders.  An SM has 65,536: 8
# warps with 232 and 4 warps with 40 (registers are allotted to four warps at a time) take 64,512.
GROUPS = gl.constexpr(2)
MULTIPLYING, LOADING = gl.constexpr(232), gl.constexpr(40)


@gluon.jit
def corner(tile, tiles_y, tiles_x, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The image of a tile, and the row and column of its first pixel."""
    y = (tile // tiles_x) % tiles_y
    return (tile // tiles_x) // tiles_y, y * ROWS, tile % tiles_x * COLUMNS


@gluon.jit
def load_weight(
    weight, weights, full, in_channels, out_channels, row, channel,
    CHANNELS: gl.constexpr, DEPTH: gl.constexpr, CHUNKS: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Load the weight of a program's output channels, in chunks."""
    BYTES: gl.constexpr = CHANNELS * DEPTH * weight.dtype.element_ty.primitive_bitwidth // 8
    if TRANSPOSED:
        matrix = tma.make_tensor_descriptor(
            weight, [in_channels, out_channels], [row, 1], [DEPTH, CHANNELS], weights.layout
        )
    else:
        matrix = tma.make_tensor_descriptor(
            weight, [out_channels, in_channels], [row, 1], [CHANNELS, DEPTH], weights.layout
        )
    for k in gl.static_range(CHUNKS):
        mbarrier.expect(full.index(k), BYTES)
        if TRANSPOSED:
            tma.async_copy_global_to_shared(matrix, [k * DEPTH, channel], full.index(k), weights.index(k))
        else:
            tma.async_copy_global_to_shared(matrix, [channel, k * DEPTH], full.index(k), weights.index(k))


@gluon.jit
def load_features(
    feature, weight, features, weights, barriers, shape, strides, weight_row, out_channels, channel, schedule,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    batch, height, width, in_channels = shape
    n_stride, y_stride, x_stride = strides
    weight_full, full, free, _ = barriers
    first, step, tiles, tiles_y, tiles_x = schedule
    BYTES: gl.constexpr = feature.dtype.element_ty.primitive_bitwidth // 8
    maps = tma.make_tensor_descriptor(
        feature, [batch, height, width, in_channels], [n_stride, y_stride, x_stride, 1],
        [1, ROWS, COLUMNS, DEPTH], features.layout,
    )  # fmt: skip
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
    chunk = 0
    for tile in range(first, tiles, step):
        n, y, x = corner(tile, tiles_y, tiles_x, ROWS, COLUMNS)
        for k in gl.static_range(CHUNKS):
            slot = chunk % STAGES
            # In the first round the slots are free: the phase before a barrier's first phase counts as over.
            mbarrier.wait(free.index(slot), (chunk // STAGES + 1) & 1)
            mbarrier.expect(full.index(slot), ROWS * COLUMNS * DEPTH * BYTES)
            tma.async_copy_global_to_shared(maps, [n, y, x, k * DEPTH], full.index(slot), features.index(slot))
            chunk += 1


@gluon.jit
def load_tops(
    top, tops, barriers, shape, strides, channel, schedule,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, CHANNELS: gl.constexpr, HAS_TOP: gl.constexpr, FOLLOWS: gl.constexpr,
):  # fmt: skip
    batch, height, width, channels = shape
    n_stride, y_stride, x_stride = strides
    full, free = barriers
    first, step, tiles, tiles_y, tiles_x = schedule
    BYTES: gl.constexpr = top.dtype.element_ty.primitive_bitwidth // 8
    if HAS_TOP:
        if FOLLOWS:
            # A group that writes a result has waited for coarse pixels, and they are loaded after this wait.
            gdc_wait()
        maps = tma.make_tensor_descriptor(
            top, [batch, height, width, channels], [n_stride, y_stride, x_stride, 1],
            [1, ROWS // 2, COLUMNS // 2, CHANNELS], tops.layout,
        )  # fmt: skip
        count = 0
        for tile in range(first, tiles, step):
            n, y, x = corner(tile, tiles_y, tiles_x, ROWS, COLUMNS)
            slot = count % GROUPS
            mbarrier.wait(free.index(slot), (count // GROUPS + 1) & 1)
            mbarrier.expect(full.index(slot), ROWS * COLUMNS // 4 * CHANNELS * BYTES)
            tma.async_copy_global_to_shared(maps, [n, y // 2, x // 2, channel], full.index(slot), tops.index(slot))
            count += 1


@gluon.jit
def multiply(
    result, bias, gain, features, weights, tops, barriers, top_barriers, channel, schedule,
    GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, HAS_TOP: gl.constexpr,
):  # fmt: skip
    out, batch, height, width, out_channels, n_stride, y_stride, x_stride = result
    weight_full, full, free, turns = barriers
    top_full, top_free = top_barriers
    first, step, tiles, tiles_y, tiles_x = schedule
    DTYPE: gl.constexpr = out.dtype.element_ty
    PIXELS: gl.constexpr = ROWS * COLUMNS
    # The result takes so many slots: the last ones of its own tile.
    PARTS: gl.constexpr = CHANNELS // DEPTH
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, CHANNELS, 16]
    )
    maps = tma.make_tensor_descriptor(
        out, [batch, height, width, out_channels], [n_stride, y_stride, x_stride, 1],
        [1, ROWS, COLUMNS, DEPTH], features.layout,
    )  # fmt: skip
    c = channel + gl.arange(0, CHANNELS, gl.SliceLayout(0, ACCUMULATOR))
    # Descriptors need multiples of 16 bytes; with that stated, a thread loads its two neighbouring channels at once.
    inside = c < out_channels // 8 * 8
    for k in gl.static_range(CHUNKS):
        mbarrier.wait(weight_full.index(k), 0)
    count = GROUP
    for tile in range(first + GROUP * step, tiles, GROUPS * step):
        n, y, x = corner(tile, tiles_y, tiles_x, ROWS, COLUMNS)
        total = gl.zeros([PIXELS, CHANNELS], gl.float32, ACCUMULATOR)
        if BIAS:
            # The sum begins with the bias, which then needs no registers in the epilogue.
            total += gl.load(bias + c, mask=inside, other=0.0).to(gl.float32)[None, :]
        begin = count * CHUNKS
        # The first tile of the first group follows no other tile.
        mbarrier.wait(turns.index(GROUP), (count // GROUPS + 1 - GROUP) & 1)
        for k in gl.static_range(CHUNKS):
            slot = (begin + k) % STAGES
            mbarrier.wait(full.index(slot), ((begin + k) // STAGES) & 1)
            pixels = features.index(slot).reshape([PIXELS, DEPTH])
            if TRANSPOSED:
                total = warpgroup_mma(pixels, weights.index(k), total, is_async=True)
            else:
                total = warpgroup_mma(pixels, weights.index(k).permute((1, 0)), total, is_async=True)
            if k > 0 and k <= CHUNKS - PARTS:
                total = warpgroup_mma_wait(1, deps=[total])
                mbarrier.arrive(free.index((begin + k - 1) % STAGES), count=1)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        total = warpgroup_mma_wait(0, deps=[total])
        if HAS_TOP:
            pairs = total.reshape([ROWS // 2, 2, COLUMNS // 2, 2, CHANNELS])
            LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, pairs.type.layout))
            mbarrier.wait(top_full.index(GROUP), (count // GROUPS) & 1)
            coarse = tops.index(GROUP).reshape([ROWS // 2, COLUMNS // 2, CHANNELS]).load(LAYOUT)
            mbarrier.arrive(top_free.index(GROUP), count=1)
            pairs = gain * (pairs + coarse.to(gl.float32).expand_dims(1).expand_dims(3))
            merged = pairs.to(DTYPE)
        else:
            merged = total.to(DTYPE)
        last = (begin + CHUNKS - 1) % STAGES
        if PARTS == 1:
            features.index(last).store(merged.reshape([1, ROWS, COLUMNS, DEPTH]))
            fence_async_shared()
            tma.async_copy_shared_to_global(maps, [n, y, x, channel], features.index(last))
            tma.store_wait(0)
        else:
            before = (begin + CHUNKS - 2) % STAGES
            halves = merged.reshape([1, ROWS, COLUMNS, 2, DEPTH]).permute((0, 1, 2, 4, 3)).split()
            features.index(before).store(halves[0])
            features.index(last).store(halves[1])
            fence_async_shared()
            tma.async_copy_shared_to_global(maps, [n, y, x, channel], features.index(before))
            tma.async_copy_shared_to_global(maps, [n, y, x, channel + DEPTH], features.index(last))
            tma.store_wait(0)
            mbarrier.arrive(free.index(before), count=1)
        mbarrier.arrive(free.index(last), count=1)
        count += GROUPS


@gluon.jit
def barriers_of(COUNT: gl.constexpr):
    """One barrier per buffer; one arrival ends a phase."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit(do_not_specialize=_NUMBERS)
def connect(
    feature, weight, bias, top, out, gain,
    batch, in_channels, out_channels, height, width, top_height, top_width,
    feature_n, feature_y, feature_x, weight_row,
    top_n, top_y, top_x, out_n, out_y, out_x,
    tiles, tiles_y, tiles_x, channel_tiles,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, HAS_TOP: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, CHANNELS: gl.constexpr, DEPTH: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    FOLLOWS: gl.constexpr, LEADS: gl.constexpr,
):  # fmt: skip
    if LEADS:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = feature.dtype.element_ty
    CHUNK: gl.constexpr = [1, ROWS, COLUMNS, DEPTH]
    features = gl.allocate_shared_memory(DTYPE, [STAGES] + CHUNK, gl.NVMMASharedLayout.get_default_for(CHUNK, DTYPE))
    PANEL: gl.constexpr = [DEPTH, CHANNELS] if TRANSPOSED else [CHANNELS, DEPTH]
    weights = gl.allocate_shared_memory(
        DTYPE, [CHUNKS] + PANEL, gl.NVMMASharedLayout.get_default_for(PANEL, DTYPE)
    )  # fmt: skip
    barriers = barriers_of(CHUNKS), barriers_of(STAGES), barriers_of(STAGES), barriers_of(GROUPS)
    top_barriers = barriers_of(GROUPS), barriers_of(GROUPS)
    program = gl.program_id(0)
    channel = program % channel_tiles * CHANNELS
    schedule = program // channel_tiles, gl.num_programs(0) // channel_tiles, tiles, tiles_y, tiles_x
    shape, strides = (batch, height, width, in_channels), (feature_n, feature_y, feature_x)
    result = (out, batch, height, width, out_channels, out_n, out_y, out_x)
    top_shape, top_strides = (batch, top_height, top_width, out_channels), (top_n, top_y, top_x)
    if HAS_TOP:
        COARSE: gl.constexpr = [1, ROWS // 2, COLUMNS // 2, CHANNELS]
        tops = gl.allocate_shared_memory(DTYPE, [GROUPS] + COARSE, gl.NVMMASharedLayout.get_default_for(COARSE, DTYPE))
    else:
        tops = features  # not used
    # The arguments are spelled out per group: a constexpr assigned to a variable is no constexpr any more.
    gl.warp_specialize([
        (multiply, (
            result, bias, gain, features, weights, tops, barriers, top_barriers, channel, schedule,
            0, ROWS, COLUMNS, CHANNELS, DEPTH, CHUNKS, STAGES, TRANSPOSED, BIAS, HAS_TOP,
        )),
        (multiply, (
            result, bias, gain, features, weights, tops, barriers, top_barriers, channel, schedule,
            1, ROWS, COLUMNS, CHANNELS, DEPTH, CHUNKS, STAGES, TRANSPOSED, BIAS, HAS_TOP,
        )),
        (load_features, (
            feature, weight, features, weights, barriers, shape, strides, weight_row, out_channels, channel, schedule,
            ROWS, COLUMNS, CHANNELS, DEPTH, CHUNKS, STAGES, TRANSPOSED,
        )),
        (load_tops, (
            top, tops, top_barriers, top_shape, top_strides, channel, schedule,
            ROWS, COLUMNS, CHANNELS, HAS_TOP, FOLLOWS,
        )),
    ], [4, 1, 1], [MULTIPLYING, LOADING, LOADING])  # fmt: skip
