// Included by vectors.h: AVX-512 (F, BW, DQ, VL).

struct Floats {
  using Scalar = float;
  static constexpr int width = 16;
  __m512 v;
};

struct Doubles {
  using Scalar = double;
  static constexpr int width = 8;
  __m512d v;
};

inline Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Doubles load(const double* from) { return {_mm512_loadu_pd(from)}; }

inline Floats load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

inline Floats load(const Half* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

// Round to nearest even.  The AVX512_BF16 instruction would flush denormal numbers to zero.
inline __m256i to_bfloat16(Floats value) {
  const __m512i bits = _mm512_castps_si512(value.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value.v, value.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(result);
}

inline __m256i to_half(Floats value) { return _mm512_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value.v); }
inline void store(double* to, Doubles value) { _mm512_storeu_pd(to, value.v); }
inline void store(BFloat16* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
}
inline void store(Half* to, Floats value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }

// Stores past the caches; `to` is aligned to 64 bytes.
inline void stream(float* to, Floats value) { _mm512_stream_ps(to, value.v); }
inline void stream(double* to, Doubles value) { _mm512_stream_pd(to, value.v); }
inline void stream(BFloat16* to, Floats value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
}
inline void stream(Half* to, Floats value) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }
inline void end_of_stream() { _mm_sfence(); }

template <class V>
inline V broadcast(typename V::Scalar value);
template <>
inline Floats broadcast<Floats>(float value) {
  return {_mm512_set1_ps(value)};
}
template <>
inline Doubles broadcast<Doubles>(double value) {
  return {_mm512_set1_pd(value)};
}

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Doubles operator+(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }

// weight * value, but 0 if the weight is 0: a pixel that is not read adds nothing even if it is infinite.
inline Floats weighted(Floats weight, Floats value) {
  const __mmask16 read = _mm512_cmp_ps_mask(weight.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return {_mm512_maskz_mul_ps(read, weight.v, value.v)};
}
inline Doubles weighted(Doubles weight, Doubles value) {
  const __mmask8 read = _mm512_cmp_pd_mask(weight.v, _mm512_setzero_pd(), _CMP_NEQ_UQ);
  return {_mm512_maskz_mul_pd(read, weight.v, value.v)};
}

inline Floats gather(const float* from, const int32_t* index) {
  return {_mm512_i32gather_ps(_mm512_loadu_si512(index), from, 4)};
}
inline Doubles gather(const double* from, const int32_t* index) {
  return {_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), from, 8)};
}

// Each element twice: the first and the second half of the doubled line.
inline void duplicate(Floats value, Floats& low, Floats& high) {
  const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  low.v = _mm512_permutexvar_ps(first, value.v);
  high.v = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), value.v);
}
inline void duplicate(Doubles value, Doubles& low, Doubles& high) {
  low.v = _mm512_permutexvar_pd(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), value.v);
  high.v = _mm512_permutexvar_pd(_mm512_setr_epi64(4, 4, 5, 5, 6, 6, 7, 7), value.v);
}

// low[0] + low[1], low[2] + low[3], ..., then the same of high.
inline Floats pair_sums(Floats low, Floats high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_add_ps(_mm512_permutex2var_ps(low.v, even, high.v), _mm512_permutex2var_ps(low.v, odd, high.v))};
}
inline Doubles pair_sums(Doubles low, Doubles high) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  return {_mm512_add_pd(_mm512_permutex2var_pd(low.v, even, high.v), _mm512_permutex2var_pd(low.v, odd, high.v))};
}

// Conversions between Floats and Doubles: the halves of a vector, and eight floats from and to memory.
inline Doubles low_half(Floats value) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(value.v))}; }
inline Doubles high_half(Floats value) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(value.v, 1))}; }
inline Doubles load_wide(const float* from) { return {_mm512_cvtps_pd(_mm256_loadu_ps(from))}; }
inline void store(float* to, Doubles value) { _mm256_storeu_ps(to, _mm512_cvtpd_ps(value.v)); }
