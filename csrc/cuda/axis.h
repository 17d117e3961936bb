// The pixels that a pixel reads, or is read by, along one axis, computed per thread.
#pragma once

#include "elements.h"

namespace fpn::cuda {

// The nearest modes of every dtype.
template <class Index>
struct NearestAxis {
  Index in_size, out_size;
  float scale, shift;

  NearestAxis(int64_t in, int64_t out, Mode mode)
      : in_size(static_cast<Index>(in)),
        out_size(static_cast<Index>(out)),
        scale(resize_scale<float>(in, out)),
        shift(mode == Mode::nearest_exact ? 0.5f : 0.0f) {}

  FPN_HOST_DEVICE Index source(Index destination) const { return nearest_source(destination, scale, shift, in_size); }
  // Destination pixels begin(s) .. end(s) read source pixel s.
  FPN_HOST_DEVICE Index begin(Index s) const { return nearest_begin(s, scale, shift, in_size, out_size); }
  FPN_HOST_DEVICE Index end(Index s) const { return begin(s + 1); }
};

// The bilinear mode; Real is double for float64 maps.
template <class Index, class Real>
struct BilinearAxis {
  Index in_size, out_size;
  Real scale;

  BilinearAxis(int64_t in, int64_t out, Mode)
      : in_size(static_cast<Index>(in)), out_size(static_cast<Index>(out)), scale(resize_scale<Real>(in, out)) {}

  FPN_HOST_DEVICE BilinearSource<Real, Index> source(Index destination) const {
    return bilinear_source<Real>(destination, scale, in_size);
  }
  FPN_HOST_DEVICE Index begin(Index s) const { return bilinear_begin(s - 1, scale, in_size, out_size); }
  FPN_HOST_DEVICE Index end(Index s) const { return bilinear_begin(s + 1, scale, in_size, out_size); }
  // The weight of s in a destination pixel.
  FPN_HOST_DEVICE Real weight(Index destination, Index s) const {
    const BilinearSource<Real, Index> read = source(destination);
    return (read.lower == s ? 1 - read.weight : Real(0)) + (read.upper == s ? read.weight : Real(0));
  }
};

template <class T, bool bilinear, class Index>
struct AxisOf {
  using type = NearestAxis<Index>;
};
template <class T, class Index>
struct AxisOf<T, true, Index> {
  using type = BilinearAxis<Index, SumOf<T>>;
};

}  // namespace fpn::cuda
