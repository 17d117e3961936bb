#pragma once

#include "../kernel.h"

namespace fpn::cpu {

// A map copied into another layout.  A unit is a block of pixels of a line.
struct Reorder {
  int64_t element;  // bytes
  Map source;
  Result out;
  int64_t channels;
  int64_t lines, length;  // of evenly spaced pixels in `source`: one line per map or one per row
  int64_t block, blocks;  // pixels per block, blocks per line
  bool streaming;         // the result is written past the caches
};

}  // namespace fpn::cpu

FPN_DECLARE_SIMD_KERNEL(reorder_blocks, Reorder)
