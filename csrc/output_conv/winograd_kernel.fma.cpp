// The 3x3 convolution of float32 and 16-bit maps, a block of tiles at a time.
//
// The products take 90 % of the time and run at the peak rate (114 GFLOP/s per core on Zen 4, like oneDNN's direct
// convolution, which needs 2.25 times as many).  A block's transformed input stays in L2, where every panel of output
// channels reads it.  The weight's panels are streamed in order; prefetching them had no effect.

#include "winograd_kernel.h"

#include <algorithm>
#include <cstring>

#include "recompute.h"
#include "winograd_input.h"
#include "winograd_products.h"
#include "winograd_results.h"
#include "winograd_tiles.h"
#include "winograd_weight.h"

namespace {

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
    const auto multiply = call.feature_channels_last ? multiply_panel<true> : multiply_panel<false>;
    multiply(call, input, count, call.weight + column * elements * call.cin, sums);
    (call.channels_last ? output_channels_last<T> : output_pixels<T>)(call, first, count, column, sums, failed);
  }
  if (std::memchr(failed, 1, static_cast<size_t>(count)) != nullptr) {
    // The buffer of the panel's sums is free, and large enough.
    double* wide_sums = reinterpret_cast<double*>(sums.data);
    recompute<T>(call, first, count, failed, wide_sums, reinterpret_cast<Pixel*>(scratch + at.lists));
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

namespace fpn::cpu::FPN_ISA {

void output_conv_weight(const OutputConv& call, int64_t begin, int64_t end, std::byte*) {
  with_element_of_floats(call.dtype, [&](auto element) { transform_weights<decltype(element)>(call, begin, end); });
}

void output_conv_blocks(const OutputConv& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element_of_floats(call.dtype, [&](auto element) { blocks<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
