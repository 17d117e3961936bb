// Properties of strides and addresses by which a call's path is chosen.
#pragma once

#include <initializer_list>

#include "../feature_map.h"
#include "elements.h"

namespace fpn::cuda {

// From the widest accesses to the most general path.
enum class Path : int64_t { nhwc_doubled = 0, nhwc = 1, nchw_doubled = 2, nchw = 3, strided = 4 };

struct Shape {
  int64_t batch, channels, height, width;
};
// Strides, 0 along axes of size 1, where PyTorch's are arbitrary.
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

// Contiguous channels, in whole and aligned accesses.
template <class Tensor>
inline bool has_channel_vectors(const Tensor& tensor, const Shape& shape, int64_t element) {
  const Strides strides = strides_of(tensor, shape);
  const int64_t width = access_bytes / element;
  return (strides.c == 1 || shape.channels == 1) &&
      divides(width, tensor.data, element, {shape.channels, strides.n, strides.y, strides.x});
}

// Contiguous pixels of a row, `width` of them per whole and aligned access.
template <class Tensor>
inline bool has_row_vectors(const Tensor& tensor, const Shape& shape, int64_t element, int64_t width) {
  const Strides strides = strides_of(tensor, shape);
  return (strides.x == 1 || shape.width == 1) &&
      divides(width, tensor.data, element, {shape.width, strides.n, strides.c, strides.y});
}

// Dense NCHW, at an aligned address.
template <class Tensor>
inline bool is_flat(const Tensor& tensor, const Shape& shape, int64_t element) {
  const Strides strides = strides_of(tensor, shape);
  const int64_t plane = shape.height * shape.width;
  const auto is = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
  return is(shape.width, strides.x, 1) && is(shape.height, strides.y, shape.width) &&
      is(shape.channels, strides.c, plane) && is(shape.batch, strides.n, shape.channels * plane) &&
      divides(access_bytes / element, tensor.data, element, {});
}

// Whether exactly two fine pixels read each coarse pixel along an axis.  At ratio 2 float32 positions are exact up to
// 2^24.
inline bool doubles(int64_t coarse, int64_t fine) { return fine == 2 * coarse && fine <= (int64_t{1} << 24); }

// The vector paths count in 32 bits.
inline bool counts_in_32_bits(std::initializer_list<int64_t> counts) {
  bool all = true;
  for (const int64_t count : counts) all = all && count <= INT32_MAX;
  return all;
}

}  // namespace fpn::cuda
