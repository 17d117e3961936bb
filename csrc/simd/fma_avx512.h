// Included by fma.h: AVX-512.

// Accumulators in registers: rows, and vectors per row.
constexpr int max_rows = 12;
constexpr int row_vectors = 2;

inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats fused(Floats sum, Floats a, Floats b) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
inline Doubles fused(Doubles sum, Doubles a, Doubles b) { return {_mm512_fmadd_pd(a.v, b.v, sum.v)}; }

inline bool all_finite(Floats value) {
  constexpr int not_finite = 0x99;  // quiet and signalling NaN, both infinities
  return _mm512_fpclass_ps_mask(value.v, not_finite) == 0;
}

// Masked elements are zero; their memory is not accessed.
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

// The even and the odd elements of the concatenation of two vectors.
inline void deinterleave(Floats low, Floats high, Floats& even, Floats& odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even.v = _mm512_permutex2var_ps(low.v, first, high.v);
  odd.v = _mm512_permutex2var_ps(low.v, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high.v);
}
