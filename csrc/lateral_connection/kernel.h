#pragma once

#include "../kernel.h"
#include "../resize_axis.h"
#include "../simd/product_sizes.h"

namespace fpn::cpu {

// out = gain * (weight x feature + bias + resize(top)).  A unit of lateral_connection_blocks is a block of pixels; of
// lateral_connection_weight, a panel of output channels (NHWC result) or an output channel.
struct LateralConnection {
  Dtype dtype;
  Map feature;          // pixels of a map evenly spaced; channels (feature_channels_last) or pixels contiguous
  Map top;              // data null: no top
  Result out;
  const void* weight_from;  // [cout, cin]
  int64_t weight_row_stride, weight_column_stride;
  void* weight;         // buffer for the packed weight, see pack_weight
  const float* bias;    // [cout]
  int64_t cin, cout, height, width;
  int64_t operands;     // channels, or pairs of channels
  int64_t weight_line;  // operands from one row, or one panel, of the packed weight to the next
  int64_t block, blocks;  // pixels per block, blocks per map
  ForwardAxis rows, columns;
  double gain;
  bool bilinear;
  bool channels_last;   // the result is NHWC
  bool feature_channels_last;
};

// Operands summed in registers at a time.  A panel's share stays in L1, and shorter chains of sums round less.
constexpr int64_t chunk = 128;

}  // namespace fpn::cpu

FPN_DECLARE_FMA_KERNEL(lateral_connection_weight, LateralConnection)
FPN_DECLARE_FMA_KERNEL(lateral_connection_blocks, LateralConnection)
FPN_DECLARE_KERNEL(avx512bf16, lateral_connection_weight, LateralConnection)
FPN_DECLARE_KERNEL(avx512bf16, lateral_connection_blocks, LateralConnection)
