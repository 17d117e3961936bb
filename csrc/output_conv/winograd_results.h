// The output transform A^T m A of a block of tiles, with the bias, for a panel of output channels.
#pragma once

#include "../simd/transposes.h"
#include "winograd_tiles.h"

namespace {

// The results of a tile, sixteen channels each: [row][column].
struct Pixels {
  Floats at[2][2];
};

// The results from the sums of a tile at `from`.  Sets *failed if one is infinite or NaN.
inline Pixels output_tile(const float* from, int64_t plane, Floats bias, unsigned char* failed) {
  Floats lines[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Floats m0 = load(from + j * plane), m1 = load(from + (4 + j) * plane);
    const Floats m2 = load(from + (8 + j) * plane), m3 = load(from + (12 + j) * plane);
    lines[0][j] = m0 + m1 + m2;
    lines[1][j] = m1 - m2 - m3;
  }
  Pixels result;
  bool finite = true;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Floats* m = lines[i];
    result.at[i][0] = m[0] + m[1] + m[2] + bias;
    result.at[i][1] = m[1] - m[2] - m[3] + bias;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) finite &= all_finite(result.at[i][j]);
  }
  if (!finite) *failed = 1;
  return result;
}

// NHWC: up to 32 channels from `column` of the block's tiles.
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
        const Elements exist = first_elements(call.cout - column - 16 * half);
        if (exist == 0) break;
        const Floats bias = load(call.bias + column + 16 * half);
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

// NCHW: eight tiles are sixteen pixels of two rows, which are transposed to lines per channel.
template <class T>
void output_pixels(
    const OutputConv& call, int64_t first, int64_t count, int64_t column, const Sums& sums, unsigned char* failed) {
  const int64_t height = call.feature.height, width = call.feature.width;
  over_runs(call, first, count, [&](const Run& run) {
    for (int64_t t = 0; t < run.count; t += 8) {
      const int64_t y = 2 * run.row, x = 2 * (run.column + t), at = run.at + t;
      const int64_t tiles = run.count - t < 8 ? run.count - t : 8;
      const Elements exist = first_elements(2 * tiles < width - x ? 2 * tiles : width - x);
      for (int64_t c = column; c < column + panel_columns && c < call.cout; c += 16) {
        const Floats bias = load(call.bias + c);
        Floats lines[2][16];
        for (int64_t k = 0; k < 8; ++k) {
          // Results beyond the run are not written: any tile will do.
          const int64_t tile = at + (k < tiles ? k : 0);
          const Pixels pixels =
              output_tile(sums.data + tile * panel_columns + (c - column), sums.plane, bias, failed + tile);
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            lines[i][2 * k] = pixels.at[i][0];
            lines[i][2 * k + 1] = pixels.at[i][1];
          }
        }
        const int64_t channels = call.cout - c < 16 ? call.cout - c : 16;
        for (int64_t i = 0; i < 2 && y + i < height; ++i) {
          transpose(lines[i]);
          T* to = static_cast<T*>(call.out.data) + run.n * call.out.stride_n + c * call.out.stride_c +
              (y + i) * call.out.stride_y + x;
          for (int64_t k = 0; k < channels; ++k, to += call.out.stride_c) {
            store_masked(to, exist, lines[i][k]);
          }
        }
      }
    }
  });
}

}  // namespace
