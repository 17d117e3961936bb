// Properties of a map's strides that the drivers choose by.
#pragma once

#include "kernel.h"
#include "tensors.h"

namespace fpn::cpu {

// All pixels at one distance, along a row and from row to row.
inline bool evenly_spaced(const Map& map) { return map.height == 1 || map.stride_y == map.width * map.stride_x; }

// Results of this many bytes or more are written past the caches.
constexpr int64_t streaming_bytes = int64_t{24} << 20;

// Whether a result is large enough for streaming stores, and its lines aligned for them.
inline bool may_stream(const Output& out) {
  const int64_t element = element_size(out.dtype());
  const int64_t line = (out.result().stride_x == 1 ? out.size(3) : out.size(1)) * element;
  return out.numel() * element >= streaming_bytes && reinterpret_cast<uintptr_t>(out.data()) % 64 == 0 &&
      line % 64 == 0;
}

// Small planes of contiguous NCHW maps are processed as one row each: a loop over the rows of a 64 x 64 plane costs as
// much as its loads and stores.
inline bool planes_are_rows(const Argument& map) {
  return map.is_contiguous() && map.size(2) * map.size(3) <= 16384;
}

// Describes each plane as one row.  stride_x is set as well: in a contiguous map of width 1 it is arbitrary.
template <class Strided>
void make_rows_of_planes(Strided& map, int64_t plane) {
  map.stride_y = plane;
  map.stride_x = 1;
}

}  // namespace fpn::cpu
