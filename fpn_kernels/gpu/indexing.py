"""Index arithmetic on the device, shared by the kernels.  The formulas are those of `fpn_kernels.resampling`."""

# ruff: noqa: N803, SIM102 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_function(function: Callable[..., Any]) -> Any:
    """`triton.jit` for functions that kernels call.

    Under the interpreter they stay plain Python: patching the language at each call takes longer than the call.
    """
    return function if INTERPRETED else triton.jit(function)


def kernel(run_time: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for a kernel that is launched.

    The `run_time` integers are not specialised on: a constexpr states where a stride is 1 or a count is even.
    """
    return triton.jit(do_not_specialize=list(run_time))


@device_function
def known_multiple(value, ALIGNMENT: tl.constexpr):
    """`value`, in a form from which the compiler can tell that ALIGNMENT (0: unknown) divides it."""
    if ALIGNMENT > 1:
        value = value // ALIGNMENT * ALIGNMENT
    return value


@device_function
def loop_bound(value):
    """A run-time bound of a `range`.

    In the interpreter of Triton 3.6 it is an array of one element, which NumPy 2.4 no longer converts to a number.
    """
    if INTERPRETED:
        value = int(value.handle.data.item())
    return value


@device_function
def widened(index, WIDE: tl.constexpr):
    """`index` in int64 where a tensor reaches beyond int32."""
    if WIDE:
        index = index.to(tl.int64)
    return index


@device_function
def along(index, stride, ALIGNMENT: tl.constexpr):
    """Offsets along the vectorised axis: its stride is 1 exactly where ALIGNMENT is not 0."""
    if ALIGNMENT == 0:
        index = index * stride
    return index


@device_function
def launch_dependents(LEADS: tl.constexpr):
    """Let the next launch begin (`launch.Link`) once every program of this one has called this."""
    if LEADS:
        if not INTERPRETED:
            gdc_launch_dependents()


@device_function
def grid_dependency_wait(FOLLOWS: tl.constexpr):
    """Wait until the previous launch has ended and its writes are visible."""
    if FOLLOWS:
        if not INTERPRETED:
            gdc_wait()


@device_function
def rounded(value, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even.

    The interpreter of Triton 3.6 and 3.7 truncates float32 to bfloat16; there the bits are rounded by hand.
    """
    if INTERPRETED:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = value.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@device_function
def operand(value, ARITHMETIC: tl.constexpr):
    """A tile as an operand of the tensor cores.

    They truncate float32 to TF32; rounding it first halves the error.  The interpreter of Triton 3.6 and 3.7 multiplies
    the integers that store bfloat16.
    """
    if INTERPRETED:
        value = value.to(tl.float32)
    elif ARITHMETIC == "tf32":
        value = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    return value


@device_function
def position_of(index, scale, MODE: tl.constexpr):
    """The position of destination pixel `index` among the source pixels, before any clamp; scale: float32(in / out)."""
    position = index.to(tl.float32)
    if MODE == "nearest":
        position = position * scale
    elif MODE == "nearest-exact":
        position = (position + 0.5) * scale
    else:
        position = scale * (position + 0.5) - 0.5
    return position


@device_function
def nearest_source(index, scale, size, MODE: tl.constexpr):
    """The source pixel of destination pixel `index`; size is the number of source pixels."""
    # Truncation is floor here: the position is not negative (for the pixels that exist).
    return tl.minimum(position_of(index, scale, MODE).to(tl.int32), size - 1)


@device_function
def bilinear_source(index, scale, size):
    """The two source pixels of destination pixel `index`, and the weight of the second."""
    position = tl.maximum(position_of(index, scale, "bilinear"), 0.0)
    lower = tl.minimum(position.to(tl.int32), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), position - lower.to(tl.float32)


@device_function
def bilinear_weight(index, source, scale, size):
    """The weight of pixel `source` in destination pixel `index`: ``max(0, 1 - |position - source|)``."""
    # Beyond either end both neighbours are the outermost pixel, whose weight is 1.
    position = tl.maximum(position_of(index, scale, "bilinear"), 0.0)
    position = tl.minimum(position, (size - 1).to(tl.float32))
    return tl.maximum(1.0 - tl.abs(position - source.to(tl.float32)), 0.0)


@device_function
def first_reader(source, scale, inverse, in_size, out_size, MODE: tl.constexpr):
    """The first destination pixel whose position is at least `source`, or `out_size`.

    The float32 estimate is off by less than half a pixel (`availability.MAX_SIDE`); the forward's formula selects among
    its floor and the next two pixels.
    """
    exact = source.to(tl.float32)
    estimate = exact * inverse
    if MODE == "nearest-exact":
        estimate = estimate - 0.5
    if MODE == "bilinear":
        estimate = estimate + (0.5 * inverse - 0.5)
    first = estimate.to(tl.int32)
    found = first
    for step in tl.static_range(2):
        found += (position_of(first + step, scale, MODE) < exact).to(tl.int32)
    found = tl.minimum(tl.maximum(found, 0), out_size)
    # Sources are clamped to the last pixel: no pixel after it is read, whatever the position.
    return tl.where(source >= in_size, out_size, found)


@device_function
def readers(source, scale, inverse, in_size, out_size, MODE: tl.constexpr):
    """The range of destination pixels that read pixel `source`; in bilinear mode, as lower or upper neighbour."""
    if MODE == "bilinear":
        first = first_reader(source - 1, scale, inverse, in_size, out_size, MODE)
    else:
        first = first_reader(source, scale, inverse, in_size, out_size, MODE)
    return first, first_reader(source + 1, scale, inverse, in_size, out_size, MODE)


@device_function
def start_of(base, first, second, first_stride, second_stride, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """The address of the tile's outer indices: two scalars per program, so that tiles keep small offsets."""
    offset = widened(first, WIDE) * known_multiple(first_stride, ALIGNMENT)
    return base + (offset + widened(second, WIDE) * known_multiple(second_stride, ALIGNMENT))


@device_function
def rows_of(first, second, first_stride, second_stride, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the rows of a tile, which are counted along two axes."""
    offset = widened(first, WIDE) * known_multiple(first_stride, ALIGNMENT)
    return offset + widened(second, WIDE) * known_multiple(second_stride, ALIGNMENT)


@device_function
def tile_of(row_offsets, columns, column_stride, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a [rows, columns] tile, vectorised along the columns where ALIGNMENT allows."""
    return row_offsets[:, None] + along(widened(columns, WIDE), column_stride, ALIGNMENT)[None, :]


@device_function
def row_tile_of(rows, columns, row_stride, column_stride, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """`tile_of` rows that are one stride apart."""
    row_offsets = widened(rows, WIDE) * known_multiple(row_stride, ALIGNMENT)
    return tile_of(row_offsets, columns, column_stride, ALIGNMENT, WIDE)
