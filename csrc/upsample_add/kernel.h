#pragma once

#include "../kernel.h"
#include "../resize_axis.h"

namespace fpn::cpu {

// out = gain * (lateral + resize(top)).  A unit is a row of the result.
struct UpsampleAdd {
  Dtype dtype;
  Map top, lateral;
  Result out;
  int64_t channels;
  ForwardAxis rows, columns;
  double gain;
  bool bilinear;
  bool channels_last;  // the result is NHWC
  bool streaming;      // the result is written past the caches
};

}  // namespace fpn::cpu

FPN_DECLARE_SIMD_KERNEL(upsample_add_rows, UpsampleAdd)
