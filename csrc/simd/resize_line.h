// Resizes a row of the coarse map along x, in the dtype of the sums.
#pragma once

#include "../resize_axis.h"
#include "vectors.h"

namespace {

inline const float* weights(const fpn::cpu::ForwardAxis& axis, float) { return axis.weight; }
inline const double* weights(const fpn::cpu::ForwardAxis& axis, double) { return axis.weight64; }

inline const float* widened(const float* line, int64_t, int64_t, float*) { return line; }
inline const double* widened(const double* line, int64_t, int64_t, double*) { return line; }
template <class T>
const float* widened(const T* line, int64_t begin, int64_t end, float* to) {
  over<Floats>(end - begin, [&](int64_t i, auto extent) {
    store(to + begin + i, load(line + begin + i, extent), extent);
  });
  return to;
}

// Writes pixels begin .. end of the resized line to to[begin .. end]; at ratio 2 it may also write neighbours.  `wide`
// is a buffer of the source width, `to` of the resized width.
template <class T, class V>
void resize_line(
    const fpn::cpu::ForwardAxis& axis,
    const T* line,
    int64_t begin,
    int64_t end,
    typename V::Scalar* wide,
    typename V::Scalar* to) {
  using A = typename V::Scalar;
  if (axis.doubled && (end + 1) / 2 - begin / 2 >= V::width) {
    // The last vector overlaps the one before it, and so does its double.
    const int64_t low_pixel = begin / 2;
    over<V>((end + 1) / 2 - low_pixel, [&](int64_t i, auto extent) {
      V low, high;
      duplicate(load(line + low_pixel + i, extent), low, high);
      store(to + 2 * (low_pixel + i), low);
      store(to + 2 * (low_pixel + i) + V::width, high);
    });
    return;
  }
  const int64_t last = axis.upper == nullptr ? axis.lower[end - 1] : axis.upper[end - 1];
  const A* source = widened(line, axis.lower[begin], last + 1, wide);
  if (axis.upper == nullptr) {
    over<V>(end - begin, [&](int64_t i, auto extent) {
      store(to + begin + i, gather<V>(source, axis.lower + begin + i, extent), extent);
    });
    return;
  }
  const A* weight = weights(axis, A());
  over<V>(end - begin, [&](int64_t i, auto extent) {
    const V upper = load(weight + begin + i, extent);
    const V lower = broadcast<V>(1) + broadcast<V>(-1) * upper;
    const V low = gather<V>(source, axis.lower + begin + i, extent);
    const V high = gather<V>(source, axis.upper + begin + i, extent);
    store(to + begin + i, lower * low + upper * high, extent);
  });
}

}  // namespace
