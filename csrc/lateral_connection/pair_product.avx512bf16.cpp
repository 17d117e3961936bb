// The matrix product of bfloat16 pairs: two channels per instruction, summed in float32.

#include "kernel.h"

#include <cstring>

#include "../simd/fma.h"

namespace {

// Channels 2 k and 2 k + 1 of a pixel or of a row of the weight, padded with zero.
using Operand = uint32_t;

inline Floats spread(const uint32_t* operand) {
  int32_t pair;
  std::memcpy(&pair, operand, sizeof pair);  // a pair of a map may be unaligned
  return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}
inline Floats multiply_add(Floats sum, Floats left, Floats right) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(left.v), reinterpret_cast<__m512bh>(right.v))};
}

// Flushes denormal numbers to zero, like the product.
inline void write_whole(BFloat16* to, Floats value) {
  const __m256bh rounded = _mm512_cvtneps_pbh(value.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(rounded));
}

inline void write_part(BFloat16* to, Floats value, int count) {
  const __m256bh rounded = _mm512_cvtneps_pbh(value.v);
  const __mmask16 exist = static_cast<__mmask16>((1u << count) - 1u);
  _mm256_mask_storeu_epi16(to, exist, reinterpret_cast<__m256i>(rounded));
}

inline __m512i words(const BFloat16* from, Whole) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512i words(const BFloat16* from, Part part) {
  const __mmask16 mask = static_cast<__mmask16>((1u << part.count) - 1u);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

}  // namespace

#include "product_operands.h"

namespace {

// Pairs k .. k + length of pixels first .. first + count: in place if they are aligned pairs, else in `packed`.
template <class T>
Left left_nhwc(
    const LateralConnection& call,
    int64_t n,
    int64_t first,
    int64_t count,
    int64_t k,
    int64_t length,
    uint32_t* packed) {
  const T* from = pixel<T>(call, n, first) + 2 * k;
  if (call.cin % 2 == 0 && call.feature.stride_x % 2 == 0) {
    return {reinterpret_cast<const uint32_t*>(from), call.feature.stride_x / 2, 1};
  }
  const int64_t channels = call.cin - 2 * k < 2 * length ? call.cin - 2 * k : 2 * length;
  for (int64_t i = 0; i < count; ++i, from += call.feature.stride_x) {
    packed[i * chunk + length - 1] = 0;
    std::memcpy(packed + i * chunk, from, channels * sizeof(T));
  }
  return {packed, chunk, 1};
}

// Pairs k .. k + length of pixels first .. first + count, as panels [pair][row] of `row` pixels each.
template <class T>
void pack_pixels(
    const LateralConnection& call,
    int64_t n,
    int64_t first,
    int64_t count,
    int64_t k,
    int64_t length,
    uint32_t* packed,
    int64_t row,
    int64_t panel) {
  for (int64_t c = 0; c < length; ++c) {
    const T* even = pixel<T>(call, n, first) + 2 * (k + c) * call.feature.stride_c;
    const bool has_odd = 2 * (k + c) + 1 < call.cin;
    const T* odd = even + (has_odd ? call.feature.stride_c : 0);
    prefetch_line(even + 16 * call.feature.stride_c, count, 2 * (k + c) + 16 < call.cin);
    prefetch_line(even + 17 * call.feature.stride_c, count, 2 * (k + c) + 17 < call.cin);
    const __m512i keep = _mm512_set1_epi32(has_odd ? -1 : 0);
    for (int64_t start = 0; start < count; start += row) {
      uint32_t* to = packed + start / row * panel + c * row;
      const int64_t pixels = count - start < row ? count - start : row;
      over<Floats>(pixels, [&](int64_t i, auto extent) {
        const __m512i high = _mm512_and_si512(_mm512_slli_epi32(words(odd + start + i, extent), 16), keep);
        const __m512i pairs = _mm512_or_si512(words(even + start + i, extent), high);
        store(reinterpret_cast<float*>(to + i), Floats{_mm512_castsi512_ps(pairs)}, extent);
      });
    }
  }
}

template <class T>
uint32_t weight_operand(const LateralConnection& call, int64_t row, int64_t k) {
  const T* from = static_cast<const T*>(call.weight_from) + row * call.weight_row_stride;
  const uint32_t low = from[2 * k * call.weight_column_stride].bits;
  const uint32_t high = 2 * k + 1 < call.cin ? from[(2 * k + 1) * call.weight_column_stride].bits : 0;
  return low | high << 16;
}

}  // namespace

#include "vector_product.h"

namespace fpn::cpu::avx512bf16 {

void lateral_connection_weight(const LateralConnection& call, int64_t begin, int64_t end, std::byte*) {
  pack_weight<BFloat16>(call, begin, end);
}

void lateral_connection_blocks(const LateralConnection& call, int64_t begin, int64_t end, std::byte* scratch) {
  blocks<BFloat16>(call, begin, end, scratch);
}

}  // namespace fpn::cpu::avx512bf16
