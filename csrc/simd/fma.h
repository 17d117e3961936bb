// Vectors for matrix products, in addition to vectors.h: fused multiply-add and masked loads and stores.  For AVX2 with
// FMA and for AVX-512, with the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// One bit per element of Floats.
using Elements = uint16_t;
constexpr Elements all_elements = 0xffff;

// The first `count` elements; none if it is negative.
inline Elements first_elements(int64_t count) {
  return count >= 16 ? all_elements : count <= 0 ? Elements(0) : static_cast<Elements>((1u << count) - 1);
}

// Like with_element, for the dtypes that are multiplied as floats (product_of in isa.h).
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
#include "fma_avx512.h"
#else
#include "fma_avx2.h"
#endif

}  // namespace
