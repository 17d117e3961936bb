// Matrix products of floats: float32 maps, and float16 maps widened.
#pragma once

#include "vectors.h"

namespace {

using Operand = float;

inline __m512 spread(const float* operand) { return _mm512_set1_ps(*operand); }
inline __m512 multiply_add(__m512 sum, __m512 left, __m512 right) { return _mm512_fmadd_ps(left, right, sum); }

inline float single(float value) { return value; }
inline float single(Half value) { return _cvtsh_ss(value.bits); }

}  // namespace

#include "product_tile.h"
