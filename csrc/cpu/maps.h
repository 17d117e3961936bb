// The threads that run the kernels, and their scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <memory>

#include "../common/tensors.h"
#include "kernels.h"

namespace fpn::cpu {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Pixels one after the other at one distance, whether along a row or from one row to the next.
inline bool evenly_spaced(const Map& map) { return map.height == 1 || map.stride_y == map.width * map.stride_x; }

// A result of this many bytes or more is written past the caches.
constexpr int64_t streaming_bytes = int64_t{24} << 20;

// Whether a result is so large that it is best written past the caches, and its lines allow it.
inline bool may_stream(const Output& out) {
  const int64_t element = element_size(out.dtype());
  const int64_t line = (out.result().stride_x == 1 ? out.size(3) : out.size(1)) * element;
  return out.numel() * element >= streaming_bytes && reinterpret_cast<uintptr_t>(out.data()) % 64 == 0 &&
      line % 64 == 0;
}

// Small planes of contiguous NCHW maps are taken as one row each, of a single image of one channel: a loop over the
// rows of a 64 x 64 map costs as much as what it moves.
inline bool planes_are_rows(const Argument& map) {
  return map.is_contiguous() && map.size(2) * map.size(3) <= 16384;
}

// Makes a row of each plane.  A contiguous map one pixel wide may have any stride from a pixel to the next (transposed,
// it has that of its rows), and the row would be read with it.
template <class Strided>
void make_rows_of_planes(Strided& map, int64_t plane) {
  map.stride_y = plane;
  map.stride_x = 1;
}

// Scratch memory of one task, from a cache line on.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(new std::byte[bytes + 64]) {}
  std::byte* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + ((64 - address % 64) % 64);
  }

 private:
  std::unique_ptr<std::byte[]> memory_;
};

// Runs a kernel over its units in PyTorch's own thread pool.
template <class Call>
void run_units(
    void (*kernel)(const Call&, int64_t, int64_t, std::byte*),
    const Call& call,
    int64_t units,
    int64_t elements_per_unit,
    int64_t scratch_bytes) {
  // Below some ten thousand elements a task costs less than handing it to another thread (ATen's GRAIN_SIZE is 32768).
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_unit));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    kernel(call, begin, end, scratch.data());
  });
}

}  // namespace fpn::cpu
