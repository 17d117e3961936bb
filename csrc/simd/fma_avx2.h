// Included by fma.h: AVX2 with FMA.

// Of sixteen registers: twelve accumulators, two right operands, one left operand.
constexpr int max_rows = 6;
constexpr int row_vectors = 1;

inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats fused(Floats sum, Floats x, Floats y) {
  return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
inline Doubles fused(Doubles sum, Doubles x, Doubles y) {
  return {_mm256_fmadd_pd(x.a, y.a, sum.a), _mm256_fmadd_pd(x.b, y.b, sum.b)};
}

// x - x is NaN if x is infinite or NaN.
inline bool all_finite(Floats value) {
  const __m256 a = _mm256_sub_ps(value.a, value.a), b = _mm256_sub_ps(value.b, value.b);
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) == 0;
}

// A vector mask from the low eight bits.
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

// AVX2 has no masks for 16 bits; edges of a map are read and written one by one.
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

// The shuffle works within 128-bit lanes; the permutation exchanges the middle two quarters.
template <int elements>
inline __m256 every_second(__m256 low, __m256 high) {
  const __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(low, high, elements));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xd8));
}
inline void deinterleave(Floats low, Floats high, Floats& even, Floats& odd) {
  even = {every_second<0x88>(low.a, low.b), every_second<0x88>(high.a, high.b)};
  odd = {every_second<0xdd>(low.a, low.b), every_second<0xdd>(high.a, high.b)};
}
