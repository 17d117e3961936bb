// Threads and their scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <memory>

#include "kernel.h"
#include "tensors.h"

namespace fpn::cpu {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Scratch memory of one task, aligned to a cache line.
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

// Runs a kernel over its units in PyTorch's thread pool.
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
