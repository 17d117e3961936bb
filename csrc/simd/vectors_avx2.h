// Included by vectors.h: AVX2 and F16C, two registers per vector.

struct Floats {
  using Scalar = float;
  static constexpr int width = 16;
  __m256 a, b;
};

struct Doubles {
  using Scalar = double;
  static constexpr int width = 8;
  __m256d a, b;
};

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Doubles load(const double* from) { return {_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4)}; }

inline __m128i load_eight(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

inline __m256 from_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats load(const BFloat16* from) {
  return {from_bfloat16(load_eight(from)), from_bfloat16(load_eight(from + 8))};
}
inline Floats load(const Half* from) {
  return {_mm256_cvtph_ps(load_eight(from)), _mm256_cvtph_ps(load_eight(from + 8))};
}

// Round to nearest even, in the low half of each 32-bit lane.
inline __m256i to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
}
inline __m256i to_bfloat16(Floats value) {
  // The pack works within 128-bit lanes; the permutation exchanges the middle two quarters.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bfloat16(value.a), to_bfloat16(value.b)), 0xd8);
}
inline __m256i to_half(Floats value) {
  return _mm256_set_m128i(
      _mm256_cvtps_ph(value.b, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(value.a, _MM_FROUND_TO_NEAREST_INT));
}

inline void store(float* to, Floats value) {
  _mm256_storeu_ps(to, value.a);
  _mm256_storeu_ps(to + 8, value.b);
}
inline void store(double* to, Doubles value) {
  _mm256_storeu_pd(to, value.a);
  _mm256_storeu_pd(to + 4, value.b);
}
inline void store(BFloat16* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
}
inline void store(Half* to, Floats value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }

// Stores past the caches; `to` is aligned to 32 bytes.
inline void stream(float* to, Floats value) {
  _mm256_stream_ps(to, value.a);
  _mm256_stream_ps(to + 8, value.b);
}
inline void stream(double* to, Doubles value) {
  _mm256_stream_pd(to, value.a);
  _mm256_stream_pd(to + 4, value.b);
}
inline void stream(BFloat16* to, Floats value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
}
inline void stream(Half* to, Floats value) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }
inline void end_of_stream() { _mm_sfence(); }

template <class V>
inline V broadcast(typename V::Scalar value);
template <>
inline Floats broadcast<Floats>(float value) {
  return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
}
template <>
inline Doubles broadcast<Doubles>(double value) {
  return {_mm256_set1_pd(value), _mm256_set1_pd(value)};
}

inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Doubles operator+(Doubles x, Doubles y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
inline Doubles operator*(Doubles x, Doubles y) { return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)}; }

// weight * value, but 0 if the weight is 0: a pixel that is not read adds nothing even if it is infinite.
inline __m256 weighted(__m256 weight, __m256 value) {
  return _mm256_and_ps(_mm256_mul_ps(weight, value), _mm256_cmp_ps(weight, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
inline __m256d weighted(__m256d weight, __m256d value) {
  return _mm256_and_pd(_mm256_mul_pd(weight, value), _mm256_cmp_pd(weight, _mm256_setzero_pd(), _CMP_NEQ_UQ));
}
inline Floats weighted(Floats weight, Floats value) {
  return {weighted(weight.a, value.a), weighted(weight.b, value.b)};
}
inline Doubles weighted(Doubles weight, Doubles value) {
  return {weighted(weight.a, value.a), weighted(weight.b, value.b)};
}

inline Floats gather(const float* from, const int32_t* index) {
  const __m256i* indices = reinterpret_cast<const __m256i*>(index);
  return {
      _mm256_i32gather_ps(from, _mm256_loadu_si256(indices), 4),
      _mm256_i32gather_ps(from, _mm256_loadu_si256(indices + 1), 4)};
}
inline Doubles gather(const double* from, const int32_t* index) {
  const __m128i* indices = reinterpret_cast<const __m128i*>(index);
  return {
      _mm256_i32gather_pd(from, _mm_loadu_si128(indices), 8),
      _mm256_i32gather_pd(from, _mm_loadu_si128(indices + 1), 8)};
}

// Each element twice: the first and the second half of the doubled line.
inline Floats duplicate(__m256 value) {
  return {
      _mm256_permutevar8x32_ps(value, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
      _mm256_permutevar8x32_ps(value, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
inline void duplicate(Floats value, Floats& low, Floats& high) {
  low = duplicate(value.a);
  high = duplicate(value.b);
}
inline void duplicate(Doubles value, Doubles& low, Doubles& high) {
  low = {_mm256_permute4x64_pd(value.a, 0x50), _mm256_permute4x64_pd(value.a, 0xfa)};
  high = {_mm256_permute4x64_pd(value.b, 0x50), _mm256_permute4x64_pd(value.b, 0xfa)};
}

// low[0] + low[1], low[2] + low[3], ..., then the same of high.
inline __m256 pair_sums(Floats eight_pairs) {
  const __m256 sums = _mm256_hadd_ps(eight_pairs.a, eight_pairs.b);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), 0xd8));
}
inline __m256d pair_sums(Doubles four_pairs) {
  return _mm256_permute4x64_pd(_mm256_hadd_pd(four_pairs.a, four_pairs.b), 0xd8);
}
inline Floats pair_sums(Floats low, Floats high) { return {pair_sums(low), pair_sums(high)}; }
inline Doubles pair_sums(Doubles low, Doubles high) { return {pair_sums(low), pair_sums(high)}; }

// Conversions between Floats and Doubles: the halves of a vector, and eight floats from and to memory.
inline Doubles widened(__m256 value) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(value)), _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1))};
}
inline Doubles low_half(Floats value) { return widened(value.a); }
inline Doubles high_half(Floats value) { return widened(value.b); }
inline Doubles load_wide(const float* from) { return widened(_mm256_loadu_ps(from)); }
inline void store(float* to, Doubles value) {
  _mm_storeu_ps(to, _mm256_cvtpd_ps(value.a));
  _mm_storeu_ps(to + 4, _mm256_cvtpd_ps(value.b));
}
