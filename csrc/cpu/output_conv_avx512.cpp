// The 3x3 convolution of float32 and float16 maps, blocks of tiles at a time.  Built for AVX-512 alone.

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "output_conv_block.h"
#include "output_conv_direct.h"
#include "output_conv_input.h"
#include "output_conv_result.h"
#include "output_conv_scratch.h"
#include "output_conv_weight.h"

namespace {

constexpr int64_t chunk = 64;
constexpr int64_t tile_rows = fpn::cpu::tile_rows;

template <int rows, bool unit_k>
inline void product_tile(const float* left, int64_t row_stride, int64_t k_stride, const float* panel, int64_t count,
                         bool add, float* to) {
  __m512 sums[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  const float* quads[(rows + 3) / 4];
#pragma GCC unroll 16
  for (int q = 0; q < (rows + 3) / 4; ++q) {
    quads[q] = left + 4 * q * row_stride;
    asm("" : "+r"(quads[q]));
  }
  for (int64_t k = 0; k < count; ++k) {
    const __m512 first = _mm512_loadu_ps(panel), second = _mm512_loadu_ps(panel + 16);
    panel += panel_columns;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const __m512 value = _mm512_set1_ps(*(quads[i / 4] + (i % 4) * row_stride));
      sums[i][0] = _mm512_fmadd_ps(value, first, sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(value, second, sums[i][1]);
    }
#pragma GCC unroll 16
    for (int q = 0; q < (rows + 3) / 4; ++q) quads[q] += unit_k ? 1 : k_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, to += panel_columns) {
    if (add) {
      sums[i][0] = _mm512_add_ps(_mm512_loadu_ps(to), sums[i][0]);
      sums[i][1] = _mm512_add_ps(_mm512_loadu_ps(to + 16), sums[i][1]);
    }
    _mm512_storeu_ps(to, sums[i][0]);
    _mm512_storeu_ps(to + 16, sums[i][1]);
  }
}

template <bool unit_k>
void product_rows(int64_t rows, const float* left, int64_t row_stride, int64_t k_stride, const float* panel,
                  int64_t count, bool add, float* to) {
  switch (rows) {
#define FPN_CASE(r) case r: return product_tile<r, unit_k>(left, row_stride, unit_k ? 1 : k_stride, panel, count, add, to)
    FPN_CASE(12); FPN_CASE(11); FPN_CASE(10); FPN_CASE(9); FPN_CASE(8); FPN_CASE(7); FPN_CASE(6); FPN_CASE(5);
    FPN_CASE(4); FPN_CASE(3); FPN_CASE(2);
    default: return product_tile<1, unit_k>(left, row_stride, k_stride, panel, count, add, to);
  }
}

void product(const OutputConv& call, const TransformedInput& input, int64_t count, const float* panel, const Sums& sums) {
  const int64_t steps = (count + tile_rows - 1) / tile_rows, rows = (count + steps - 1) / steps;
  for (int e = 0; e < elements; ++e) {
    for (int64_t k = 0; k < call.cin; k += chunk) {
      const int64_t length = std::min(call.cin - k, chunk);
      for (int64_t t = 0; t < count; t += rows) {
        const float* left = input.data + e * input.plane + t * input.tile + k * input.channel;
        float* to = sums.data + e * sums.plane + t * panel_columns;
        (input.channel == 1 ? product_rows<true> : product_rows<false>)(
            std::min(rows, count - t), left, input.tile, input.channel, panel, length, k > 0, to);
      }
      panel += length * panel_columns;
    }
  }
}

template <class T>
void block(const OutputConv& call, int64_t first, int64_t count, std::byte* scratch) {
  const fpn::cpu::OutputConvScratch at(call);
  TransformedInput input{reinterpret_cast<float*>(scratch), at.input_plane, at.input_tile, at.input_channel};
  const Sums sums{reinterpret_cast<float*>(scratch + at.sums), at.sums_plane};
  unsigned char* failed = reinterpret_cast<unsigned char*>(scratch + at.failed);
  std::memset(failed, 0, static_cast<size_t>(count));
  if (call.feature_channels_last) {
    T* padding = reinterpret_cast<T*>(scratch + at.lists);
    std::memset(padding, 0, static_cast<size_t>(call.cin) * sizeof(T));
    input_channels_last<T>(call, first, count, input, padding);
  } else {
    Group* groups = reinterpret_cast<Group*>(scratch + at.lists);
    (call.feature.stride_x == 1 ? input_pixels<T, false> : input_pixels<T, true>)(call, first, count, input, groups);
  }
  for (int64_t column = 0; column < call.cout; column += panel_columns) {
    product(call, input, count, call.weight + column * elements * call.cin, sums);
    (call.channels_last ? output_channels_last<T> : output_pixels<T>)(call, first, count, column, sums, failed);
  }
  if (std::memchr(failed, 1, static_cast<size_t>(count)) != nullptr) {
    recompute<T>(call, first, count, failed, sums.data, reinterpret_cast<Pixel*>(scratch + at.lists));
  }
}

template <class T>
void blocks(const OutputConv& call, int64_t begin, int64_t end, std::byte* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * call.block;
    if (first < call.tiles) block<T>(call, first, std::min(call.block, call.tiles - first), scratch);
  }
}

}  // namespace

namespace fpn::cpu::avx512 {

void output_conv_weight(const OutputConv& call, int64_t begin, int64_t end, std::byte*) {
  (call.dtype == Dtype::float32 ? transform_weights<float> : transform_weights<Half>)(call, begin, end);
}

void output_conv_blocks(const OutputConv& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.dtype == Dtype::float32 ? blocks<float> : blocks<Half>)(call, begin, end, scratch);
}

}  // namespace fpn::cpu::avx512
