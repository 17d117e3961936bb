#pragma once

#include "../kernel.h"

namespace fpn::cpu {

// grad_input = factor * grad, and the sums of grad * input in float64.  A unit is a row of grad_input.
struct WeightedMergeBackward {
  Dtype dtype;
  Map grad, input;
  Result grad_input;
  int64_t channels;
  double factor;
  bool channels_last;  // grad_input is NHWC
  bool streaming;      // grad_input is written past the caches
  double* sums;        // one per unit
};

}  // namespace fpn::cpu

FPN_DECLARE_SIMD_KERNEL(weighted_merge_backward_rows, WeightedMergeBackward)
