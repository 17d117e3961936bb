// Rows of a map, for the kernels that compute a result row by row.
#pragma once

#include "../kernel.h"
#include "resize_line.h"
#include "vectors.h"

namespace {

template <class T>
const T* row(const fpn::cpu::Map& map, int64_t n, int64_t y) {
  return static_cast<const T*>(map.data) + n * map.stride_n + y * map.stride_y;
}

template <class T>
T* row(const fpn::cpu::Result& result, int64_t n, int64_t y) {
  return static_cast<T*>(result.data) + n * result.stride_n + y * result.stride_y;
}

// `count` elements `stride` apart: in place if contiguous, else copied to `line`.
template <class T>
const T* packed(const T* from, int64_t stride, int64_t count, T* line) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < count; ++i) line[i] = from[i * stride];
  return line;
}

// A row of pixels in NHWC: in place if the channels are contiguous, else copied to `line`.
template <class T>
const T* packed_row(const fpn::cpu::Map& map, int64_t n, int64_t y, int64_t channels, int64_t& stride_x, T* line) {
  const T* from = row<T>(map, n, y);
  stride_x = map.stride_x;
  if (map.stride_c == 1) return from;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < map.width; ++x) line[x * channels + c] = from[c * map.stride_c + x * map.stride_x];
  }
  stride_x = channels;
  return line;
}

template <bool streaming, class T, class V, class Extent>
inline void put(T* to, V value, Extent extent) {
  if constexpr (streaming) {
    static_cast<void>(extent);
    stream(to, value);
  } else {
    store(to, value, extent);
  }
}

// The rows of a coarse plane that a row of the result reads, resized along x.  They are kept for the next rows, most of
// which read the same.
template <class T, class V>
class ResizedRows {
 public:
  using A = typename V::Scalar;

  // Advances `scratch` by held_rows_bytes.
  ResizedRows(
      const fpn::cpu::Map& map,
      const fpn::cpu::ForwardAxis& rows,
      const fpn::cpu::ForwardAxis& columns,
      int64_t width,
      std::byte*& scratch)
      : map_(map), rows_(rows), columns_(columns), width_(width) {
    lower_ = take<A>(scratch, width);
    upper_ = take<A>(scratch, width);
    wide_ = take<A>(scratch, map.width);
    staged_ = take<T>(scratch, map.width);
  }

  void enter(int64_t n, int64_t c) {
    plane_ = row<T>(map_, n, 0) + c * map_.stride_c;
    lower_held_ = upper_held_ = -1;
  }

  // Sets lower() and, in the bilinear mode, upper() to the rows that row y of the result reads.
  void hold(int64_t y) {
    const int64_t lower = rows_.lower[y];
    const bool bilinear = rows_.upper != nullptr;
    if (bilinear && lower == upper_held_) {
      A* was = lower_;
      lower_ = upper_;
      upper_ = was;
      upper_held_ = lower_held_;
      lower_held_ = lower;
    }
    if (lower != lower_held_) {
      expand(lower, lower_);
      lower_held_ = lower;
    }
    if (!bilinear) return;
    const int64_t upper = rows_.upper[y];
    if (upper != upper_held_) {
      expand(upper, upper_);
      upper_held_ = upper;
    }
  }

  const A* lower() const { return lower_; }
  const A* upper() const { return upper_; }

 private:
  template <class U>
  static U* take(std::byte*& scratch, int64_t count) {
    U* taken = reinterpret_cast<U*>(scratch);
    scratch += fpn::cpu::line_bytes(count, 8);
    return taken;
  }

  void expand(int64_t y, A* to) {
    const T* line = packed(plane_ + y * map_.stride_y, map_.stride_x, map_.width, staged_);
    resize_line<T, V>(columns_, line, 0, width_, wide_, to);
  }

  const fpn::cpu::Map& map_;
  const fpn::cpu::ForwardAxis& rows_;
  const fpn::cpu::ForwardAxis& columns_;
  const int64_t width_;
  const T* plane_ = nullptr;
  int64_t lower_held_ = -1, upper_held_ = -1;
  A *lower_, *upper_, *wide_;
  T* staged_;
};

}  // namespace
