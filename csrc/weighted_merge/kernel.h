#pragma once

#include "../kernel.h"
#include "../resize_axis.h"

namespace fpn::cpu {

// One input of a weighted merge.
struct WeightedMap {
  Map map;
  bool resized;
  ForwardAxis rows, columns;  // if resized
  double factor;
};

// out = sum of factor * resize(map).  A unit is a row of the result.
struct WeightedMerge {
  Dtype dtype;
  WeightedMap inputs[3];
  int64_t count;  // of inputs: 2 or 3; the first is never resized
  Result out;
  int64_t channels, height, width;
  bool bilinear;
  bool channels_last;  // the result is NHWC
  bool streaming;      // the result is written past the caches
};

}  // namespace fpn::cpu

FPN_DECLARE_SIMD_KERNEL(weighted_merge_rows, WeightedMerge)
