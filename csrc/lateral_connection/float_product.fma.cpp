// The matrix product of floats: of float32 maps, and of 16-bit maps that are widened.

#include "kernel.h"

#include <cstring>

#include "../simd/fma.h"

namespace {

using Operand = float;

inline Floats spread(const float* operand) { return broadcast<Floats>(*operand); }
inline Floats multiply_add(Floats sum, Floats left, Floats right) { return fused(sum, left, right); }

template <class T>
inline void write_whole(T* to, Floats value) {
  store(to, value);
}
template <class T>
inline void write_part(T* to, Floats value, int count) {
  store(to, value, Part{count});
}

}  // namespace

#include "product_operands.h"

namespace {

// Channels k .. k + length of pixels first .. first + count: float32 in place, 16 bits widened into `packed`.
template <class T>
Left left_nhwc(
    const LateralConnection& call, int64_t n, int64_t first, int64_t count, int64_t k, int64_t length, float* packed) {
  const T* from = pixel<T>(call, n, first) + k;
  if constexpr (std::is_same<T, float>::value) {
    static_cast<void>(count);
    static_cast<void>(length);
    static_cast<void>(packed);
    return {from, call.feature.stride_x, 1};
  } else {
    for (int64_t i = 0; i < count; ++i, from += call.feature.stride_x) {
      float* to = packed + i * chunk;
      over<Floats>(length, [&](int64_t j, auto extent) { store(to + j, load(from + j, extent), extent); });
    }
    return {packed, chunk, 1};
  }
}

// Channels k .. k + length of pixels first .. first + count, as panels [channel][row] of `row` pixels each.
template <class T>
void pack_pixels(
    const LateralConnection& call,
    int64_t n,
    int64_t first,
    int64_t count,
    int64_t k,
    int64_t length,
    float* packed,
    int64_t row,
    int64_t panel) {
  for (int64_t c = 0; c < length; ++c) {
    const T* from = pixel<T>(call, n, first) + (k + c) * call.feature.stride_c;
    prefetch_line(from + 8 * call.feature.stride_c, count, k + c + 8 < call.cin);
    for (int64_t start = 0; start < count; start += row) {
      float* to = packed + start / row * panel + c * row;
      const int64_t pixels = count - start < row ? count - start : row;
      over<Floats>(pixels, [&](int64_t i, auto extent) { store(to + i, load(from + start + i, extent), extent); });
    }
  }
}

template <class T>
float weight_operand(const LateralConnection& call, int64_t row, int64_t k) {
  const T* from = static_cast<const T*>(call.weight_from);
  return single(from[row * call.weight_row_stride + k * call.weight_column_stride]);
}

}  // namespace

#include "vector_product.h"

namespace fpn::cpu::FPN_ISA {

void lateral_connection_weight(const LateralConnection& call, int64_t begin, int64_t end, std::byte*) {
  with_element_of_floats(call.dtype, [&](auto element) { pack_weight<decltype(element)>(call, begin, end); });
}

void lateral_connection_blocks(const LateralConnection& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element_of_floats(call.dtype, [&](auto element) { blocks<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
