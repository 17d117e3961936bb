// Included by transposes.h: AVX2.

using Register = __m256i;
constexpr int lanes = 2;

inline Register load_register(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
template <bool streaming>
inline void store_register(void* to, Register value) {
  if constexpr (streaming) {
    _mm256_stream_si256(static_cast<__m256i*>(to), value);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
  }
}

template <int bytes>
inline Register unpack_low(Register a, Register b) {
  if constexpr (bytes == 2) return _mm256_unpacklo_epi16(a, b);
  if constexpr (bytes == 4) return _mm256_unpacklo_epi32(a, b);
  if constexpr (bytes == 8) return _mm256_unpacklo_epi64(a, b);
}
template <int bytes>
inline Register unpack_high(Register a, Register b) {
  if constexpr (bytes == 2) return _mm256_unpackhi_epi16(a, b);
  if constexpr (bytes == 4) return _mm256_unpackhi_epi32(a, b);
  if constexpr (bytes == 8) return _mm256_unpackhi_epi64(a, b);
}
