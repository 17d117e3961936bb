// Square tiles transposed in registers.  A row of a tile is one register, for every width of an element.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

#if defined(__AVX512BW__)
#include "transposes_avx512.h"
#elif defined(__AVX2__)
#include "transposes_avx2.h"
#else
#include "transposes_portable.h"
#endif

#if defined(__AVX512BW__) || defined(__AVX2__)

template <class T>
constexpr int64_t tile_of = sizeof(Register) / sizeof(T);

// Transposes rows of 32-bit or 64-bit elements in place.  First within lanes of `group` elements: row[group * j + i]
// then holds column group * k + i of `group` rows in lane k.  The exchange of lanes completes the columns.
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

// Transposes sixteen vectors of floats in place.
inline void transpose(Floats (&rows)[16]) {
#if defined(__AVX512BW__)
  Register all[16];
  for (int i = 0; i < 16; ++i) all[i] = _mm512_castps_si512(rows[i].v);
  transpose_registers<4>(all);
  for (int i = 0; i < 16; ++i) rows[i].v = _mm512_castsi512_ps(all[i]);
#else
  // The two quarters off the diagonal are exchanged.
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
    // Two rows are interleaved to pairs, which are transposed as 32-bit elements.  A lane of eight columns contributes
    // four pairs to each half.
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

#endif

}  // namespace
