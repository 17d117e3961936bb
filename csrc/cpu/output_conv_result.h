// The output transform A^T m A of a block of tiles, with the bias, for a panel of output channels.
#pragma once

#include "output_conv_block.h"
#include "transposes.h"

namespace {

// Results of a tile, sixteen channels each: rows, columns.
struct Pixels {
  __m512 at[2][2];
};

// The sums of a tile from `from` on.  Raises *failed where a result is infinite or NaN.
inline Pixels output_tile(const float* from, int64_t plane, __m512 bias, unsigned char* failed) {
  __m512 lines[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 m0 = _mm512_loadu_ps(from + j * plane), m1 = _mm512_loadu_ps(from + (4 + j) * plane);
    const __m512 m2 = _mm512_loadu_ps(from + (8 + j) * plane), m3 = _mm512_loadu_ps(from + (12 + j) * plane);
    lines[0][j] = _mm512_add_ps(_mm512_add_ps(m0, m1), m2);
    lines[1][j] = _mm512_sub_ps(_mm512_sub_ps(m1, m2), m3);
  }
  Pixels result;
  constexpr int not_finite = 0x99;  // quiet and signalling NaN, both infinities
  unsigned failures = 0;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512* m = lines[i];
    result.at[i][0] = _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]), bias);
    result.at[i][1] = _mm512_add_ps(_mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]), bias);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) failures |= _mm512_fpclass_ps_mask(result.at[i][j], not_finite);
  }
  if (failures != 0) *failed = 1;
  return result;
}

// Results NHWC: channels column .. column + 32 (those that exist) of the block's tiles.
template <class T>
void output_channels_last(
    const OutputConv& call, int64_t first, int64_t count, int64_t column, const Sums& sums, unsigned char* failed) {
  const int64_t height = call.feature.height, width = call.feature.width;
  over_runs(call, first, count, [&](const Run& run) {
    const int64_t y = 2 * run.row;
    T* line = static_cast<T*>(call.out.data) + run.n * call.out.stride_n + y * call.out.stride_y + column;
    for (int64_t t = 0; t < run.count; ++t) {
      const int64_t x = 2 * (run.column + t), at = run.at + t;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __mmask16 exist = first_elements(call.cout - column - 16 * half);
        if (exist == 0) break;
        const __m512 bias = _mm512_loadu_ps(call.bias + column + 16 * half);
        const Pixels pixels =
            output_tile(sums.data + at * panel_columns + 16 * half, sums.plane, bias, failed + at);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            if (y + i >= height || x + j >= width) continue;
            store_masked(
                line + i * call.out.stride_y + (x + j) * call.out.stride_x + 16 * half, exist, pixels.at[i][j]);
          }
        }
      }
    }
  });
}

// Results NCHW: eight tiles make sixteen pixels of two rows, which are transposed to lines of a channel.
template <class T>
void output_pixels(
    const OutputConv& call, int64_t first, int64_t count, int64_t column, const Sums& sums, unsigned char* failed) {
  const int64_t height = call.feature.height, width = call.feature.width;
  over_runs(call, first, count, [&](const Run& run) {
    for (int64_t t = 0; t < run.count; t += 8) {
      const int64_t y = 2 * run.row, x = 2 * (run.column + t), at = run.at + t;
      const int64_t tiles = run.count - t < 8 ? run.count - t : 8;
      const __mmask16 exist = first_elements(2 * tiles < width - x ? 2 * tiles : width - x);
      for (int64_t c = column; c < column + panel_columns && c < call.cout; c += 16) {
        const __m512 bias = _mm512_loadu_ps(call.bias + c);
        Register lines[2][16];
        for (int64_t k = 0; k < 8; ++k) {
          // What lies beyond the run is written nowhere: any tile will do.
          const int64_t tile = at + (k < tiles ? k : 0);
          const Pixels pixels =
              output_tile(sums.data + tile * panel_columns + (c - column), sums.plane, bias, failed + tile);
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            lines[i][2 * k] = _mm512_castps_si512(pixels.at[i][0]);
            lines[i][2 * k + 1] = _mm512_castps_si512(pixels.at[i][1]);
          }
        }
        const int64_t channels = call.cout - c < 16 ? call.cout - c : 16;
        for (int64_t i = 0; i < 2 && y + i < height; ++i) {
          transpose_registers<4>(lines[i]);
          T* to = static_cast<T*>(call.out.data) + run.n * call.out.stride_n + c * call.out.stride_c +
              (y + i) * call.out.stride_y + x;
          for (int64_t k = 0; k < channels; ++k, to += call.out.stride_c) {
            store_masked(to, exist, _mm512_castsi512_ps(lines[i][k]));
          }
        }
      }
    }
  });
}

}  // namespace
