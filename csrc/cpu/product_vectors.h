// What matrix products need of vectors beyond vectors.h: products and sums fused into one rounding, and vectors of which
// some elements exist.  For AVX-512, and for AVX2 with FMA; the bits are the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// One bit for each element of a vector of floats.
using Elements = uint16_t;
constexpr Elements all_elements = 0xffff;

// The first `count`; none where it is negative.
inline Elements first_elements(int64_t count) {
  return count >= 16 ? all_elements : count <= 0 ? Elements(0) : static_cast<Elements>((1u << count) - 1);
}

// As with_element, of the dtypes that are multiplied as floats (capability.h: product_of).
template <class Step>
inline void with_element_of_floats(fpn::Dtype dtype, Step&& step) {
  with_element(dtype, [&](auto element) {
    if constexpr (!std::is_same<decltype(element), double>::value) step(element);
  });
}

inline float single(float value) { return value; }
inline float single(Half value) { return _cvtsh_ss(value.bits); }
inline float single(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

#if defined(__AVX512BW__)

// Sums that stay in registers: rows, and vectors of sixteen in a row.
constexpr int most_rows = 12;
constexpr int row_vectors = 2;

inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats fused(Floats sum, Floats a, Floats b) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
inline Doubles fused(Doubles sum, Doubles a, Doubles b) { return {_mm512_fmadd_pd(a.v, b.v, sum.v)}; }

inline bool all_finite(Floats value) {
  constexpr int not_finite = 0x99;  // quiet and signalling NaN, both infinities
  return _mm512_fpclass_ps_mask(value.v, not_finite) == 0;
}

// Elements that do not exist are zero, and their memory is not touched.
inline Floats load_masked(const float* from, Elements exist) { return {_mm512_maskz_loadu_ps(exist, from)}; }
inline Floats load_masked(const Half* from, Elements exist) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(exist, from))};
}
inline Floats load_masked(const BFloat16* from, Elements exist) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, from)), 16))};
}
inline void store_masked(float* to, Elements exist, Floats value) { _mm512_mask_storeu_ps(to, exist, value.v); }
inline void store_masked(Half* to, Elements exist, Floats value) {
  _mm256_mask_storeu_epi16(to, exist, to_half(value));
}
inline void store_masked(BFloat16* to, Elements exist, Floats value) {
  _mm256_mask_storeu_epi16(to, exist, to_bfloat16(value));
}

// Every second element of two vectors side by side: from the first on, and from the second on.
inline void deinterleave(Floats low, Floats high, Floats& even, Floats& odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even.v = _mm512_permutex2var_ps(low.v, first, high.v);
  odd.v = _mm512_permutex2var_ps(low.v, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high.v);
}

#else

// Sixteen registers: twelve of sums, two of a row's right operands, one of its left one.
constexpr int most_rows = 6;
constexpr int row_vectors = 1;

inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats fused(Floats sum, Floats x, Floats y) {
  return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
inline Doubles fused(Doubles sum, Doubles x, Doubles y) {
  return {_mm256_fmadd_pd(x.a, y.a, sum.a), _mm256_fmadd_pd(x.b, y.b, sum.b)};
}

// The difference of an infinity or a NaN with itself is NaN.
inline bool all_finite(Floats value) {
  const __m256 a = _mm256_sub_ps(value.a, value.a), b = _mm256_sub_ps(value.b, value.b);
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) == 0;
}

// All bits of those of eight elements that exist.
inline __m256i lanes_of(unsigned exist) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(exist)), bits), bits);
}

inline Floats load_masked(const float* from, Elements exist) {
  if (exist == all_elements) return load(from);
  return {_mm256_maskload_ps(from, lanes_of(exist)), _mm256_maskload_ps(from + 8, lanes_of(exist >> 8))};
}
inline void store_masked(float* to, Elements exist, Floats value) {
  if (exist == all_elements) return store(to, value);
  _mm256_maskstore_ps(to, lanes_of(exist), value.a);
  _mm256_maskstore_ps(to + 8, lanes_of(exist >> 8), value.b);
}

// AVX2 has no masks for 16 bits: at the edges of a map one by one.
template <class T>
inline Floats load_masked(const T* from, Elements exist) {
  if (exist == all_elements) return load(from);
  T padded[16] = {};
  for (unsigned left = exist; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left);
    padded[i] = from[i];
  }
  return load(padded);
}
template <class T>
inline void store_masked(T* to, Elements exist, Floats value) {
  if (exist == all_elements) return store(to, value);
  T padded[16];
  store(padded, value);
  for (unsigned left = exist; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left);
    to[i] = padded[i];
  }
}

// The shuffle works within 128-bit lanes: the middle two quarters change places afterwards.
template <int elements>
inline __m256 every_second(__m256 low, __m256 high) {
  const __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(low, high, elements));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xd8));
}
inline void deinterleave(Floats low, Floats high, Floats& even, Floats& odd) {
  even = {every_second<0x88>(low.a, low.b), every_second<0x88>(high.a, high.b)};
  odd = {every_second<0xdd>(low.a, low.b), every_second<0xdd>(high.a, high.b)};
}

#endif

}  // namespace
