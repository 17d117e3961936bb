// Included by transposes.h: AVX-512.

using Register = __m512i;
constexpr int lanes = 4;  // of 128 bits

inline Register load_register(const void* from) { return _mm512_loadu_si512(from); }
template <bool streaming>
inline void store_register(void* to, Register value) {
  if constexpr (streaming) {
    _mm512_stream_si512(static_cast<__m512i*>(to), value);
  } else {
    _mm512_storeu_si512(to, value);
  }
}

template <int bytes>
inline Register unpack_low(Register a, Register b) {
  if constexpr (bytes == 2) return _mm512_unpacklo_epi16(a, b);
  if constexpr (bytes == 4) return _mm512_unpacklo_epi32(a, b);
  if constexpr (bytes == 8) return _mm512_unpacklo_epi64(a, b);
}
template <int bytes>
inline Register unpack_high(Register a, Register b) {
  if constexpr (bytes == 2) return _mm512_unpackhi_epi16(a, b);
  if constexpr (bytes == 4) return _mm512_unpackhi_epi32(a, b);
  if constexpr (bytes == 8) return _mm512_unpackhi_epi64(a, b);
}

// Transposes lanes: lane k of register i becomes lane i of register k.
inline void transpose_lanes(Register& a, Register& b, Register& c, Register& d) {
  const Register even_low = _mm512_shuffle_i32x4(a, b, 0x88), odd_low = _mm512_shuffle_i32x4(a, b, 0xdd);
  const Register even_high = _mm512_shuffle_i32x4(c, d, 0x88), odd_high = _mm512_shuffle_i32x4(c, d, 0xdd);
  a = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
  b = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
  c = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
  d = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
}
