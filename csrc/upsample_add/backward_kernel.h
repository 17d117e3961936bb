#pragma once

#include "../kernel.h"
#include "../resize_axis.h"

namespace fpn::cpu {

// grad_top = upstream + gain * adjoint of the resize; optionally also the sums of grad for the bias, in float64.
// A unit is a row of grad_top: (n * C + c) * height + y in NCHW, n * height + y in NHWC.
struct UpsampleAddBackward {
  Dtype dtype;
  Map grad;
  Result grad_top;
  const void* upstream;  // the upstream gradient of top, with the strides of grad_top; or null
  int64_t channels, top_height, top_width;
  AdjointAxis rows, columns;
  double gain;
  bool bilinear;
  bool channels_last;  // grad_top is NHWC
  double* bias_sums;   // [units] in NCHW, [units][channels] in NHWC; or null
};

}  // namespace fpn::cpu

FPN_DECLARE_SIMD_KERNEL(upsample_add_backward_rows, UpsampleAddBackward)
