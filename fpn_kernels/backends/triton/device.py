"""Index arithmetic on the device, shared by the kernels.  The formulas are those of `fpn_kernels.resampling`."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def known_multiple(value, ALIGNMENT: tl.constexpr):
    """`value`, in a form from which the compiler can tell that ALIGNMENT (0: unknown) divides it."""
    if ALIGNMENT > 1:
        value = value // ALIGNMENT * ALIGNMENT
    return value


@triton.jit
def widened(index, WIDE: tl.constexpr):
    """`index` in int64 where a tensor reaches beyond int32."""
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def along(index, stride, ALIGNMENT: tl.constexpr):
    """Offsets along the vectorised axis: its stride is 1 exactly where ALIGNMENT is not 0."""
    if ALIGNMENT == 0:
        index = index * stride
    return index


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even.

    The interpreter of Triton 3.6 and 3.7 truncates float32 to bfloat16; there the bits are rounded by hand.
    """
    if INTERPRETED:
        if DTYPE == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def nearest_source(index, scale, size, MODE: tl.constexpr):
    """The source pixel of destination pixel `index`; scale is float32(in) / float32(out), size is in."""
    position = index.to(tl.float32)
    if MODE == "nearest-exact":
        position = position + 0.5
    # Truncation is floor here: the product is not negative (for the pixels that exist).
    return tl.minimum((position * scale).to(tl.int32), size - 1)


@triton.jit
def bilinear_source(index, scale, size):
    """The two source pixels of destination pixel `index`, and the weight of the second."""
    position = tl.maximum(scale * (index.to(tl.float32) + 0.5) - 0.5, 0.0)
    lower = tl.minimum(position.to(tl.int32), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), position - lower.to(tl.float32)


@triton.jit
def lower_source(index, scale, size, MODE: tl.constexpr):
    """The (lower) source pixel of destination pixel `index`: non-decreasing in `index`."""
    if MODE == "bilinear":
        position = tl.maximum(scale * (index.to(tl.float32) + 0.5) - 0.5, 0.0)
        source = tl.minimum(position.to(tl.int32), size - 1)
    else:
        source = nearest_source(index, scale, size, MODE)
    return source


@triton.jit
def first_reader(source, scale, inverse, in_size, out_size, MODE: tl.constexpr):
    """The first destination pixel whose (lower) source is at or after `source`; `out_size` where there is none.

    The float32 estimate is less than a pixel off (`eligibility.LONGEST_SIDE`), so that the answer lies among five
    neighbours; how many of them still read an earlier source is counted with the forward's own arithmetic.
    """
    estimate = source.to(tl.float32) * inverse
    if MODE == "nearest-exact":
        estimate = estimate - 0.5
    if MODE == "bilinear":
        estimate = estimate + (0.5 * inverse - 0.5)
    first = estimate.to(tl.int32) - 2
    before = (source * 0).to(tl.int32)
    for step in tl.static_range(5):
        before += (lower_source(first + step, scale, in_size, MODE) < source).to(tl.int32)
    # Nothing is read after the last source pixel, whose readers the clamped index would count as later ones' too.
    found = tl.minimum(tl.maximum(first + before, 0), out_size)
    return tl.where(source >= in_size, out_size, found)


@triton.jit
def start_of(base, first, second, first_stride, second_stride, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """Where the tile's outer indices begin: two scalars a program, so that tiles keep small offsets."""
    offset = widened(first, WIDE) * known_multiple(first_stride, ALIGNMENT)
    return base + (offset + widened(second, WIDE) * known_multiple(second_stride, ALIGNMENT))


@triton.jit
def tile_of(rows, columns, row_stride, column_stride, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a [rows, columns] tile, vectorised along the columns where ALIGNMENT allows."""
    row_offsets = widened(rows, WIDE) * known_multiple(row_stride, ALIGNMENT)
    column_offsets = along(widened(columns, WIDE), column_stride, ALIGNMENT)
    return row_offsets[:, None] + column_offsets[None, :]
