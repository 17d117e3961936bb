// Source indices of torch.nn.functional.interpolate: the arithmetic of fpn_kernels/resampling.py, bit for bit.
//
// For the host and the device.  The build forbids fused operations (-ffp-contract=off, -fmad=false).  Index is int64_t,
// or int32_t for a short axis, which the device converts to float at a fraction of the cost.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FPN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FPN_HOST_DEVICE inline
#endif

namespace fpn {

// In the order of resampling.MODES; passed as an integer.
enum class Mode : int64_t { nearest = 0, nearest_exact = 1, bilinear = 2 };

// Source pixels per destination pixel.  Real is float, or double for the bilinear mode of float64 maps.
template <class Real>
FPN_HOST_DEVICE Real resize_scale(int64_t in_size, int64_t out_size) {
  return static_cast<Real>(in_size) / static_cast<Real>(out_size);
}

// The source of a destination pixel in the nearest modes.  shift is 0, or 0.5 for nearest-exact.
template <class Index>
FPN_HOST_DEVICE Index nearest_source(Index destination, float scale, float shift, Index in_size) {
  const float position = (static_cast<float>(destination) + shift) * scale;
  const Index source = static_cast<Index>(floorf(position));
  return source < in_size ? source : in_size - 1;
}

// The two sources of a destination pixel in the bilinear mode (align_corners=False).
template <class Real, class Index = int64_t>
struct BilinearSource {
  Index lower;
  Index upper;
  Real weight;  // of the upper pixel; the lower one has 1 - weight
};

template <class Real, class Index>
FPN_HOST_DEVICE BilinearSource<Real, Index> bilinear_source(Index destination, Real scale, Index in_size) {
  Real position = scale * (static_cast<Real>(destination) + Real(0.5)) - Real(0.5);
  position = position > Real(0) ? position : Real(0);
  Index lower = static_cast<Index>(position);
  lower = lower < in_size ? lower : in_size - 1;
  return {lower, lower + (lower < in_size - 1 ? 1 : 0), position - static_cast<Real>(lower)};
}

// The first destination pixel whose source is at least `source`, or out_size.  source_of is non-decreasing.  The guess
// affects only the time: source_of, the forward's function, decides, so the ranges are exact at every pair of sizes.
template <class Index, class Source>
FPN_HOST_DEVICE Index first_reader(Index source, Index guess, Index in_size, Index out_size, Source source_of) {
  if (source <= 0) return 0;
  if (source >= in_size) return out_size;
  Index first = guess < 0 ? 0 : guess < out_size ? guess : out_size;
  while (first > 0 && source_of(first - 1) >= source) --first;
  while (first < out_size && source_of(first) < source) ++first;
  return first;
}

// A position as a guess for first_reader, clamped to out_size.
template <class Index, class Real>
FPN_HOST_DEVICE Index guessed(Real position, Index out_size) {
  return position < static_cast<Real>(out_size) ? static_cast<Index>(position) : out_size;
}

template <class Index>
FPN_HOST_DEVICE Index nearest_begin(Index source, float scale, float shift, Index in_size, Index out_size) {
  const Index guess = guessed(ceilf(static_cast<float>(source) / scale - shift), out_size);
  return first_reader(source, guess, in_size, out_size, [=](Index destination) {
    return nearest_source(destination, scale, shift, in_size);
  });
}

// The same for the lower of the two bilinear sources.  Pixel s is read by bilinear_begin(s - 1) up to
// bilinear_begin(s + 1), whose lower source is s - 1 or s.
template <class Real, class Index>
FPN_HOST_DEVICE Index bilinear_begin(Index source, Real scale, Index in_size, Index out_size) {
  const Real position = (static_cast<Real>(source) + Real(0.5)) / scale - Real(0.5);
  return first_reader(source, guessed(ceil(position), out_size), in_size, out_size, [=](Index destination) {
    return bilinear_source<Real>(destination, scale, in_size).lower;
  });
}

}  // namespace fpn
