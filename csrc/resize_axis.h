// The source pixels of a resize along one axis, as tables.  ResizeTable and AdjointTable (resize_table.h) own the
// memory.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace fpn::cpu {

// The coarse pixels that each fine pixel reads.
struct ForwardAxis {
  const int32_t* lower;
  const int32_t* upper;    // null in the nearest modes
  const float* weight;     // of `upper`, for maps of up to 32 bits
  const double* weight64;  // of `upper`, for float64 maps
  bool doubled;            // nearest at ratio 2: lower[i] == i / 2
};

// The fine pixels that read each coarse pixel s: begin[s] .. begin[s] + count[s].
struct AdjointAxis {
  const int32_t* begin;
  const int32_t* count;
  int64_t longest;         // the largest count
  // [longest][coarse size]: the k-th fine pixel of each coarse pixel and its weight, zero beyond the count.
  const int32_t* index;
  const float* weight;
  const double* weight64;
  // The fine pixels whose lower pixel is s: each fine pixel belongs to one coarse pixel.
  const int32_t* own_begin;
  const int32_t* own_count;
  bool doubled;            // begin[s] == 2 s, count[s] == 2, weights 1
};

// Scratch memory of ResizedRows (simd/map_rows.h): two resized rows, and two source rows.
inline constexpr int64_t held_rows_bytes(int64_t width, int64_t top_width) {
  return 2 * line_bytes(width, 8) + 2 * line_bytes(top_width, 8);
}

}  // namespace fpn::cpu
