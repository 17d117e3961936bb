// Shared by both types of `Operand`, which the including file defines before.
#pragma once

namespace {

using fpn::cpu::LateralConnection;

constexpr int64_t chunk = fpn::cpu::chunk;

// The left operand of a tile: element (row, k) at data[row * row_stride + k * k_stride].
struct Left {
  const Operand* data;
  int64_t row_stride, k_stride;
};

// Pixels are evenly spaced, also from row to row.
template <class T>
const T* pixel(const LateralConnection& call, int64_t n, int64_t index) {
  return static_cast<const T*>(call.feature.data) + n * call.feature.stride_n + index * call.feature.stride_x;
}

// A block's share of a channel is too short for the hardware prefetcher.
template <class T>
inline void prefetch_line(const T* line, int64_t count, bool exists) {
  if (!exists) return;
  const char* bytes = reinterpret_cast<const char*>(line);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

}  // namespace
