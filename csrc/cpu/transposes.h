// Square tiles transposed in registers: one row of a tile is one register, whatever the width of an element.
//
// Everything is in an anonymous namespace, as in vectors.h: this is compiled once a level.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

#if defined(__AVX512BW__)

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

// Registers as rows of lanes: lane k of row i becomes lane i of row k.
inline void transpose_lanes(Register& a, Register& b, Register& c, Register& d) {
  const Register even_low = _mm512_shuffle_i32x4(a, b, 0x88), odd_low = _mm512_shuffle_i32x4(a, b, 0xdd);
  const Register even_high = _mm512_shuffle_i32x4(c, d, 0x88), odd_high = _mm512_shuffle_i32x4(c, d, 0xdd);
  a = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
  b = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
  c = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
  d = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
}

#elif defined(__AVX2__)

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

#endif

#if defined(__AVX512BW__) || defined(__AVX2__)

template <class T>
constexpr int64_t tile_of = sizeof(Register) / sizeof(T);

// Rows of 32-bit or 64-bit elements, in place.  Within a lane first: then row[group * j + i], with `group` elements a
// lane, holds in lane k the column group * k + i of `group` rows; exchanging lanes puts whole columns together.
template <int bytes>
inline void transpose_registers(Register* row) {
  constexpr int group = 16 / bytes;
  constexpr int count = lanes * group;
  for (int i = 0; i < count; i += 2) {
    const Register low = unpack_low<bytes>(row[i], row[i + 1]), high = unpack_high<bytes>(row[i], row[i + 1]);
    row[i] = low;
    row[i + 1] = high;
  }
  if constexpr (bytes == 4) {
    for (int i = 0; i < count; i += 4) {
      const Register first = unpack_low<8>(row[i], row[i + 2]), second = unpack_high<8>(row[i], row[i + 2]);
      const Register third = unpack_low<8>(row[i + 1], row[i + 3]), fourth = unpack_high<8>(row[i + 1], row[i + 3]);
      row[i] = first;
      row[i + 1] = second;
      row[i + 2] = third;
      row[i + 3] = fourth;
    }
  }
  for (int i = 0; i < group; ++i) {
#if defined(__AVX512BW__)
    transpose_lanes(row[i], row[i + group], row[i + 2 * group], row[i + 3 * group]);
#else
    const Register low = _mm256_permute2x128_si256(row[i], row[i + group], 0x20);
    row[i + group] = _mm256_permute2x128_si256(row[i], row[i + group], 0x31);
    row[i] = low;
#endif
  }
}

// Sixteen vectors of floats, in place.
inline void transpose(Floats (&rows)[16]) {
#if defined(__AVX512BW__)
  Register all[16];
  for (int i = 0; i < 16; ++i) all[i] = _mm512_castps_si512(rows[i].v);
  transpose_registers<4>(all);
  for (int i = 0; i < 16; ++i) rows[i].v = _mm512_castsi512_ps(all[i]);
#else
  // Of the four quarters, those beside the diagonal change places.
  Register quarters[2][2][8];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 8; ++i) {
      quarters[0][half][i] = _mm256_castps_si256(rows[8 * half + i].a);
      quarters[1][half][i] = _mm256_castps_si256(rows[8 * half + i].b);
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int other = 0; other < 2; ++other) transpose_registers<4>(quarters[half][other]);
    for (int i = 0; i < 8; ++i) {
      rows[8 * half + i].a = _mm256_castsi256_ps(quarters[half][0][i]);
      rows[8 * half + i].b = _mm256_castsi256_ps(quarters[half][1][i]);
    }
  }
#endif
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < tile_of<T>.
template <bool streaming, class T>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int bytes = sizeof(T);
  Register row[lanes * (bytes == 8 ? 2 : 4)];
  constexpr int count = sizeof(row) / sizeof(Register);
  if constexpr (bytes != 2) {
    for (int i = 0; i < count; ++i) row[i] = load_register(from + i * from_stride);
    transpose_registers<bytes>(row);
    for (int i = 0; i < count; ++i) store_register<streaming>(to + i * to_stride, row[i]);
  } else {
    // Two rows make one of pairs, which are transposed as 32-bit elements: a lane of eight columns gives four pairs to
    // the first half and four to the second.
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < count; ++i) {
        const Register even = load_register(from + 2 * i * from_stride);
        const Register odd = load_register(from + (2 * i + 1) * from_stride);
        row[i] = half == 0 ? unpack_low<2>(even, odd) : unpack_high<2>(even, odd);
      }
      transpose_registers<4>(row);
      for (int i = 0; i < count; ++i) {
        store_register<streaming>(to + (i / 4 * 8 + 4 * half + i % 4) * to_stride, row[i]);
      }
    }
  }
}

#else

template <class T>
constexpr int64_t tile_of = 8;

template <bool streaming, class T>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int64_t j = 0; j < tile_of<T>; ++j) {
    for (int64_t i = 0; i < tile_of<T>; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

#endif

}  // namespace
