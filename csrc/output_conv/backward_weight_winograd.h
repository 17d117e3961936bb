#pragma once

#include "winograd_kernel.h"

namespace fpn::cpu {

// The gradients of the 3x3 weight and bias by Winograd's minimal filtering, see backward_weight_winograd.fma.cpp.
// A unit is one part of the output channels by one part of the input channels.
struct OutputConvBackwardWeight {
  OutputConv conv;        // dtype, feature, sizes and tiles
  Map grad;               // like the feature; channels contiguous
  Result out;             // [cout, cin, 3, 3]
  double* bias_sums;      // [cout], or null
  uint8_t* finite;        // per unit: all its sums are finite
  int64_t part_out, part_in;  // output and input channels per unit
  int64_t parts_out, parts_in;
  int64_t block;          // tiles transformed at a time
  int64_t grad_plane, input_plane;  // floats from one transformed element to the next
  int64_t input_at, sums_at, bias_at, zeros_at, scratch_bytes;
};

}  // namespace fpn::cpu

FPN_DECLARE_FMA_KERNEL(output_conv_backward_weight_parts, OutputConvBackwardWeight)
