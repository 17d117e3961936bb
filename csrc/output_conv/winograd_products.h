// The sixteen matrix products of a block of tiles with a panel of output channels.
//
// A tile of 6 x 32 sums (6 x 16 on AVX2) stays in registers, with as many totals (on AVX2 in L1).  Short chains of
// additions limit the error: 8 products form a sum, 8 sums a total, and the totals of 64 channels each are added in
// memory.  The error on 256 channels of normal numbers is 3.0 roundings; oneDNN's is 3.8 (NCHW) to 14 (NHWC).  A tile
// of 12 x 32 without totals was 3 to 5 % faster but had an error of 4.6.
#pragma once

#include "winograd_tiles.h"

namespace {

constexpr int register_rows = 6;
constexpr int64_t register_columns = 16 * row_vectors;
constexpr int link = 8;
constexpr int64_t chain = 64;

// to = (first) or += the product of `count` channels of `rows` rows of the input with columns of a panel.
// channels_last: the input's channels are contiguous and rows are `stride` apart; else the rows are contiguous and
// channels `stride` apart.
template <int rows, bool channels_last>
void add_products(const float* input, int64_t stride, const float* panel, int64_t count, bool first, float* to) {
  // Four rows share an address register: x86 has too few for one each.
  const float* fifth = input + 4 * stride;
  asm("" : "+r"(fifth));
  const auto spread = [&](int row, int ahead) {
    if constexpr (channels_last) {
      // A separate variable: GCC 12 subscripts the conditional itself wrongly under -fsanitize=shift.
      const float* from = row < 4 ? input : fifth;
      return broadcast<Floats>(from[row % 4 * stride + ahead]);
    }
    return broadcast<Floats>(input[row]);
  };
  const auto advance = [&](int channels) {
    input += channels_last ? channels : channels * stride;
    fifth += channels_last ? channels : 0;
  };
  Floats totals[rows][row_vectors];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) totals[i][j] = broadcast<Floats>(0.0f);
  }
  for (; count >= link; count -= link) {
    Floats sums[rows][row_vectors];
#pragma GCC unroll 8
    for (int k = 0; k < link; ++k, panel += panel_columns) {
      Floats right[row_vectors];
#pragma GCC unroll 2
      for (int j = 0; j < row_vectors; ++j) right[j] = load(panel + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const Floats value = spread(i, k);
#pragma GCC unroll 2
        for (int j = 0; j < row_vectors; ++j) {
          sums[i][j] = k == 0 ? value * right[j] : fused(sums[i][j], value, right[j]);
        }
      }
      if constexpr (!channels_last) advance(1);
    }
    if constexpr (channels_last) advance(link);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < row_vectors; ++j) totals[i][j] = totals[i][j] + sums[i][j];
    }
  }
  for (; count > 0; --count, panel += panel_columns) {
    Floats right[row_vectors];
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) right[j] = load(panel + 16 * j);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const Floats value = spread(i, 0);
#pragma GCC unroll 2
      for (int j = 0; j < row_vectors; ++j) totals[i][j] = fused(totals[i][j], value, right[j]);
    }
    advance(1);
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i, to += panel_columns) {
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) {
      const Floats before = first ? broadcast<Floats>(0.0f) : load(to + 16 * j);
      store(to + 16 * j, before + totals[i][j]);
    }
  }
}

template <bool channels_last, int height = register_rows>
void add_rows(
    int64_t rows, const float* input, int64_t stride, const float* panel, int64_t count, bool first, float* to) {
  if constexpr (height > 1) {
    if (rows < height) return add_rows<channels_last, height - 1>(rows, input, stride, panel, count, first, to);
  }
  add_products<height, channels_last>(input, stride, panel, count, first, to);
}

template <bool channels_last>
void multiply_panel(
    const OutputConv& call, const TransformedInput& input, int64_t count, const float* panel, const Sums& sums) {
  const int64_t stride = channels_last ? input.tile : input.channel;
  // Register tiles of nearly equal height.
  const int64_t steps = (count + register_rows - 1) / register_rows, rows = (count + steps - 1) / steps;
  for (int e = 0; e < elements; ++e) {
    for (int64_t k = 0; k < call.cin; k += chain) {
      const int64_t length = call.cin - k < chain ? call.cin - k : chain;
      for (int64_t t = 0; t < count; t += rows) {
        const float* from = input.data + e * input.plane + t * input.tile + k * input.channel;
        float* to = sums.data + e * sums.plane + t * panel_columns;
        const int64_t height = count - t < rows ? count - t : rows;
        for (int64_t column = 0; column < panel_columns; column += register_columns) {
          add_rows<channels_last>(height, from, stride, panel + column, length, k == 0, to + column);
        }
      }
      panel += length * panel_columns;
    }
  }
}

}  // namespace
