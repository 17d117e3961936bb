// Which path a call takes: what the strides and addresses of its tensors allow.
#pragma once

#include <initializer_list>

#include "../common/maps.h"
#include "elements.h"

namespace fpn::cuda {

// From the widest accesses to the plainest; each serves what the ones before it cannot.
enum class Path : int64_t { nhwc_doubled = 0, nhwc = 1, nchw_doubled = 2, nchw = 3, strided = 4 };

// A map's strides and sizes with those along axes of one pixel made 0: PyTorch leaves them arbitrary.
struct Shape {
  int64_t batch, channels, height, width;
};
struct Strides {
  int64_t n, c, y, x;
};

template <class Tensor>
inline Strides strides_of(const Tensor& tensor, const Shape& shape) {
  return {
      shape.batch > 1 ? tensor.stride_n : 0, shape.channels > 1 ? tensor.stride_c : 0,
      shape.height > 1 ? tensor.stride_y : 0, shape.width > 1 ? tensor.stride_x : 0};
}

inline bool divides(int64_t width, const void* data, int64_t element, std::initializer_list<int64_t> counts) {
  bool all = reinterpret_cast<uintptr_t>(data) % (width * element) == 0;
  for (const int64_t count : counts) all = all && count % width == 0;
  return all;
}

// Channels side by side, in whole and aligned accesses.
template <class Tensor>
inline bool has_channel_vectors(const Tensor& tensor, const Shape& shape, int64_t element) {
  const Strides strides = strides_of(tensor, shape);
  const int64_t width = access_bytes / element;
  return (strides.c == 1 || shape.channels == 1) &&
      divides(width, tensor.data, element, {shape.channels, strides.n, strides.y, strides.x});
}

// Pixels of a row side by side, `width` of them in a whole and aligned access.
template <class Tensor>
inline bool has_row_vectors(const Tensor& tensor, const Shape& shape, int64_t element, int64_t width) {
  const Strides strides = strides_of(tensor, shape);
  return (strides.x == 1 || shape.width == 1) &&
      divides(width, tensor.data, element, {shape.width, strides.n, strides.c, strides.y});
}

// All elements side by side in NCHW order, from an aligned address on.
template <class Tensor>
inline bool is_flat(const Tensor& tensor, const Shape& shape, int64_t element) {
  const Strides strides = strides_of(tensor, shape);
  const int64_t plane = shape.height * shape.width;
  const auto is = [](int64_t size, int64_t stride, int64_t wanted) { return size == 1 || stride == wanted; };
  return is(shape.width, strides.x, 1) && is(shape.height, strides.y, shape.width) &&
      is(shape.channels, strides.c, plane) && is(shape.batch, strides.n, shape.channels * plane) &&
      divides(access_bytes / element, tensor.data, element, {});
}

// Whether each coarse pixel is read by exactly two fine ones along an axis.  At a ratio of two the float32 positions
// are exact up to 2^24, where float32 stops counting by ones.
inline bool doubles(int64_t coarse, int64_t fine) { return fine == 2 * coarse && fine <= (int64_t{1} << 24); }

// What the vector paths count with.
inline bool counts_in_32_bits(std::initializer_list<int64_t> counts) {
  bool all = true;
  for (const int64_t count : counts) all = all && count <= INT32_MAX;
  return all;
}

}  // namespace fpn::cuda
