// The 3x3 convolution of float32 and float16 maps, a block of tiles at a time.  Built for AVX-512 alone.
//
// The products take all but a tenth of the time, and run at the rate of the processor's multipliers (Zen 4: 114 GFLOP/s
// a core, of which oneDNN's direct convolution has as many).  The transformed input of a block stays in the second
// cache, where every panel of output channels reads it again; the weight's panels stream by in the order in which they
// lie.  Fetching them ahead changed nothing.

#include <algorithm>
#include <cstring>

#include "output_conv_block.h"
#include "output_conv_direct.h"
#include "output_conv_input.h"
#include "output_conv_result.h"
#include "output_conv_weight.h"

namespace {

// Products added up in registers at a time, then added to those before.  Shorter chains round less: at 256 channels the
// error is 4.5 roundings with 64, 3.7 with 32 and 3.4 with 16, where oneDNN has 3.8; at 1,024 it is 5.0, 4.6 and 5.0,
// and 4.3 (Zen 4).
constexpr int64_t chain = 32;

// The transformed input has its channels side by side, or its tiles: `stride` is that of the other.
template <int rows, bool channels_last>
void add_products(const float* input, int64_t stride, const float* panel, int64_t count, bool first, float* to) {
  const Left left{input, channels_last ? stride : 1, channels_last ? 1 : stride};
  __m512 sums[rows][2];
  multiply_tile<rows, channels_last>(left, panel, count, sums);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, to += panel_columns) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to + 16 * j);
      _mm512_storeu_ps(to + 16 * j, _mm512_add_ps(before, sums[i][j]));
    }
  }
}

// The sixteen matrix products of a block with a panel of output channels.
void multiply_panel(
    const OutputConv& call, const TransformedInput& input, int64_t count, const float* panel, const Sums& sums) {
  // Register tiles of equal height, or nearly.
  const int64_t heights = (count + tile_rows - 1) / tile_rows, rows = (count + heights - 1) / heights;
  for (int e = 0; e < elements; ++e) {
    for (int64_t k = 0; k < call.cin; k += chain) {
      const int64_t length = std::min(call.cin - k, chain);
      for (int64_t t = 0; t < count; t += rows) {
        const float* left = input.data + e * input.plane + t * input.tile + k * input.channel;
        float* to = sums.data + e * sums.plane + t * panel_columns;
        with_rows(std::min(rows, count - t), [&](auto height) {
          if (call.feature_channels_last) {
            add_products<height.value, true>(left, input.tile, panel, length, k == 0, to);
          } else {
            add_products<height.value, false>(left, input.channel, panel, length, k == 0, to);
          }
        });
      }
      panel += length * panel_columns;
    }
  }
}

template <class T>
void block(const OutputConv& call, int64_t first, int64_t count, std::byte* scratch) {
  const fpn::cpu::OutputConvScratch at(call);
  const TransformedInput input{
      reinterpret_cast<float*>(scratch), at.input_plane, at.input_tile, at.input_channel};
  const Sums sums{reinterpret_cast<float*>(scratch + at.sums), at.sums_plane};
  unsigned char* failed = reinterpret_cast<unsigned char*>(scratch + at.failed);
  std::memset(failed, 0, static_cast<size_t>(count));
  if (call.feature_channels_last) {
    T* padding = reinterpret_cast<T*>(scratch + at.lists);
    std::memset(static_cast<void*>(padding), 0, static_cast<size_t>(call.cin) * sizeof(T));
    input_channels_last<T>(call, first, count, input, padding);
  } else {
    Group* groups = reinterpret_cast<Group*>(scratch + at.lists);
    (call.feature.stride_x == 1 ? input_pixels<T, false> : input_pixels<T, true>)(call, first, count, input, groups);
  }
  for (int64_t column = 0; column < call.cout; column += panel_columns) {
    multiply_panel(call, input, count, call.weight + column * elements * call.cin, sums);
    (call.channels_last ? output_channels_last<T> : output_pixels<T>)(call, first, count, column, sums, failed);
  }
  if (std::memchr(failed, 1, static_cast<size_t>(count)) != nullptr) {
    // The panel's sums are done with: their room is large enough.
    double* room = reinterpret_cast<double*>(sums.data);
    recompute<T>(call, first, count, failed, room, reinterpret_cast<Pixel*>(scratch + at.lists));
  }
}

template <class T>
void blocks(const OutputConv& call, int64_t begin, int64_t end, std::byte* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * call.block;
    block<T>(call, first, std::min(call.block, call.tiles - first), scratch);
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
