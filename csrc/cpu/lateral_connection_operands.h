// What the two kinds of operands share; included after `Operand` is defined.
#pragma once

namespace {

using fpn::cpu::LateralConnection;

// Operands (channels, or pairs of them) added up in registers at a time: a panel's share stays in the first cache,
// and shorter chains of sums round less.
constexpr int64_t chunk = fpn::cpu::chunk;

// Left operand of a tile: element (row, k) is at data[row * row_stride + k * k_stride].
struct Left {
  const Operand* data;
  int64_t row_stride, k_stride;
};

// The pixels of a map are evenly spaced: stride_x from one to the next, across rows as well.
template <class T>
const T* pixel(const LateralConnection& call, int64_t n, int64_t index) {
  return static_cast<const T*>(call.feature.data) + n * call.feature.stride_n + index * call.feature.stride_x;
}

// A block's share of a channel is too short for the hardware to see it coming.
template <class T>
inline void fetch_ahead(const T* line, int64_t count, bool exists) {
  if (!exists) return;
  const char* bytes = reinterpret_cast<const char*>(line);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

}  // namespace
