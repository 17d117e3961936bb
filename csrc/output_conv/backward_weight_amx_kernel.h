#pragma once

#include "../amx/sizes.h"

namespace fpn::cpu {

// The gradient of the 3x3 weight by AMX tiles.
//
// The pixels of all maps form one line of positions, with a zero after each row and a row of zeros after each map.
// A unit is one part of the output channels by one part of the input channels.
struct AmxOutputConvBackwardWeight {
  Map grad, feature;
  Result out;             // bfloat16 [cout, cin, 3, 3]
  double* bias_sums;      // [cout], or null
  uint8_t* finite;        // per unit: all its sums are finite
  int64_t batch, cout, cin;
  int64_t panels, chunks;  // of 32 output channels, of 32 input channels
  int64_t parts_out, parts_in;
  int64_t pitch;          // positions from row to row
  int64_t steps, blocks;  // steps of 32 positions; blocks of steps
  int64_t max_steps;     // of a block
  int64_t halo;           // steps before and after a block, of the feature only
  int64_t window_bytes;   // of sixteen channels of the feature: a block and its halo
  int64_t left_at, right_at, sums_at, lines_at, pixels_at, zeros_at, scratch_bytes;
};

}  // namespace fpn::cpu

FPN_DECLARE_KERNEL(amx, output_conv_backward_weight_parts, AmxOutputConvBackwardWeight)
