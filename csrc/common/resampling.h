// Source indices of torch.nn.functional.interpolate: the arithmetic of fpn_kernels/resampling.py, bit for bit.
//
// Everything here is one float32 operation after another, so that no compiler may fuse two of them, and compiles
// for the host and for the device alike.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FPN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FPN_HOST_DEVICE inline
#endif

namespace fpn {

// The order of resampling.MODES; passed as an integer.
enum class Mode : int64_t { nearest = 0, nearest_exact = 1, bilinear = 2 };

// Source pixels to one destination pixel.  Real is float, or double for the bilinear mode of float64 maps.
template <class Real>
FPN_HOST_DEVICE Real resize_scale(int64_t in_size, int64_t out_size) {
  return static_cast<Real>(in_size) / static_cast<Real>(out_size);
}

// The pixel that a destination pixel reads in the nearest modes; shift is 0, or 0.5 for nearest-exact.
FPN_HOST_DEVICE int64_t nearest_source(int64_t destination, float scale, float shift, int64_t in_size) {
  const float position = (static_cast<float>(destination) + shift) * scale;
  const int64_t source = static_cast<int64_t>(floorf(position));
  return source < in_size ? source : in_size - 1;
}

// The two pixels that a destination pixel reads in the bilinear mode (align_corners=False).
template <class Real>
struct BilinearSource {
  int64_t lower;
  int64_t upper;
  Real weight;  // of the upper pixel; the lower one has 1 - weight
};

template <class Real>
FPN_HOST_DEVICE BilinearSource<Real> bilinear_source(int64_t destination, Real scale, int64_t in_size) {
  Real position = scale * (static_cast<Real>(destination) + Real(0.5)) - Real(0.5);
  position = position > Real(0) ? position : Real(0);
  int64_t lower = static_cast<int64_t>(position);
  lower = lower < in_size ? lower : in_size - 1;
  return {lower, lower + (lower < in_size - 1 ? 1 : 0), position - static_cast<Real>(lower)};
}

}  // namespace fpn
