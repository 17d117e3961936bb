// The sixteen matrix products of a block of tiles with a panel of output channels.
//
// A tile of 6 x 32 sums is in registers, and as many again for their totals.  How many numbers are added up one after
// the other decides the error, of which the transforms leave Winograd's convolution little: 8 products make a sum, 8
// sums a total, and the totals of 64 channels each are added up in memory.  On 256 channels of normal numbers that errs
// by 3.0 roundings, where oneDNN has 3.8 (NCHW) to 14 (NHWC).  A tile of 12 x 32 without totals took 3 to 5 % less time
// and erred by 4.6 in sums of 64, which is more than oneDNN does.
#pragma once

#include "output_conv_block.h"

namespace {

constexpr int register_rows = 6;
constexpr int link = 8;
constexpr int64_t chain = 64;

// to = or += `count` channels of some rows of input x panel.  The transformed input has its channels side by side, or its
// tiles: `stride` is from one to the next of the other.
template <int rows, bool channels_last>
void add_products(const float* input, int64_t stride, const float* panel, int64_t count, bool first, float* to) {
  // Four rows share an address register: x86 has too few of them for one each.
  const float* fifth = input + 4 * stride;
  asm("" : "+r"(fifth));
  const auto spread = [&](int row, int ahead) {
    if constexpr (channels_last) {
      // A name of its own: GCC 12 subscripts the conditional itself wrongly under -fsanitize=shift.
      const float* from = row < 4 ? input : fifth;
      return _mm512_set1_ps(from[row % 4 * stride + ahead]);
    }
    return _mm512_set1_ps(input[row]);
  };
  const auto advance = [&](int channels) {
    input += channels_last ? channels : channels * stride;
    fifth += channels_last ? channels : 0;
  };
  __m512 totals[rows][2];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) totals[i][0] = totals[i][1] = _mm512_setzero_ps();
  for (; count >= link; count -= link) {
    __m512 sums[rows][2];
#pragma GCC unroll 8
    for (int k = 0; k < link; ++k, panel += panel_columns) {
      const __m512 left = _mm512_loadu_ps(panel), right = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const __m512 value = spread(i, k);
        sums[i][0] = k == 0 ? _mm512_mul_ps(value, left) : _mm512_fmadd_ps(value, left, sums[i][0]);
        sums[i][1] = k == 0 ? _mm512_mul_ps(value, right) : _mm512_fmadd_ps(value, right, sums[i][1]);
      }
      if constexpr (!channels_last) advance(1);
    }
    if constexpr (channels_last) advance(link);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      totals[i][0] = _mm512_add_ps(totals[i][0], sums[i][0]);
      totals[i][1] = _mm512_add_ps(totals[i][1], sums[i][1]);
    }
  }
  for (; count > 0; --count, panel += panel_columns) {
    const __m512 left = _mm512_loadu_ps(panel), right = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const __m512 value = spread(i, 0);
      totals[i][0] = _mm512_fmadd_ps(value, left, totals[i][0]);
      totals[i][1] = _mm512_fmadd_ps(value, right, totals[i][1]);
    }
    advance(1);
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i, to += panel_columns) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to + 16 * j);
      _mm512_storeu_ps(to + 16 * j, _mm512_add_ps(before, totals[i][j]));
    }
  }
}

template <bool channels_last>
void add_rows(
    int64_t rows, const float* input, int64_t stride, const float* panel, int64_t count, bool first, float* to) {
  static_assert(register_rows == 6);
  switch (rows) {
    case 6: return add_products<6, channels_last>(input, stride, panel, count, first, to);
    case 5: return add_products<5, channels_last>(input, stride, panel, count, first, to);
    case 4: return add_products<4, channels_last>(input, stride, panel, count, first, to);
    case 3: return add_products<3, channels_last>(input, stride, panel, count, first, to);
    case 2: return add_products<2, channels_last>(input, stride, panel, count, first, to);
    default: return add_products<1, channels_last>(input, stride, panel, count, first, to);
  }
}

template <bool channels_last>
void multiply_panel(
    const OutputConv& call, const TransformedInput& input, int64_t count, const float* panel, const Sums& sums) {
  const int64_t stride = channels_last ? input.tile : input.channel;
  // Register tiles of equal height, or nearly.
  const int64_t steps = (count + register_rows - 1) / register_rows, rows = (count + steps - 1) / steps;
  for (int e = 0; e < elements; ++e) {
    for (int64_t k = 0; k < call.cin; k += chain) {
      const int64_t length = call.cin - k < chain ? call.cin - k : chain;
      for (int64_t t = 0; t < count; t += rows) {
        const float* from = input.data + e * input.plane + t * input.tile + k * input.channel;
        float* to = sums.data + e * sums.plane + t * panel_columns;
        add_rows<channels_last>(count - t < rows ? count - t : rows, from, stride, panel, length, k == 0, to);
      }
      panel += length * panel_columns;
    }
  }
}

}  // namespace
