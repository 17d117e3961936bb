// grad_top = gain * adjoint of the resize: the code of one thread on each path, and the choice of the path.
//
// A gather: each coarse pixel sums the fine pixels that read it, rows first, in the order of the CPU kernel, bit for
// bit.  Compiles for the host as well, so that tests/cuda/ runs every path without a GPU.
#pragma once

#include <type_traits>

#include "axis.h"
#include "fast_divide.h"
#include "geometry.h"

namespace fpn::cuda {

struct UpsampleAddBackward {
  Dtype dtype;
  Map grad;
  Result grad_top;
  int64_t batch, channels, top_height, top_width;
  Mode mode;
  double gain;

  Shape coarse() const { return {batch, channels, top_height, top_width}; }
  Shape fine() const { return {batch, channels, grad.height, grad.width}; }
};

// The dtype of the accumulators.  A bilinear gradient is a longer sum; in float32 it was less exact than eager's.
template <class T, bool bilinear>
using GatherSum = typename std::conditional<bilinear && std::is_same<T, float>::value, double, SumOf<T>>::type;

// The fields that all paths share.
template <class T, class Sum = SumOf<T>>
struct Adjoint {
  const T* grad;
  T* grad_top;
  Strides grad_strides, top_strides;
  Sum gain;

  explicit Adjoint(const UpsampleAddBackward& call)
      : grad(static_cast<const T*>(call.grad.data)),
        grad_top(static_cast<T*>(call.grad_top.data)),
        grad_strides(strides_of(call.grad, call.fine())),
        top_strides(strides_of(call.grad_top, call.coarse())),
        gain(static_cast<Sum>(call.gain)) {}
};

// NHWC at ratio 2: four fine vectors per coarse vector.
template <class T>
struct NhwcDoubledAdjoint : Adjoint<T> {
  static constexpr int width = Vector<T>::width;
  FastDivide by_vectors, by_width, by_height;

  explicit NhwcDoubledAdjoint(const UpsampleAddBackward& call)
      : Adjoint<T>(call), by_vectors(call.channels / width), by_width(call.top_width), by_height(call.top_height) {}

  static int64_t items(const UpsampleAddBackward& call) {
    return call.batch * call.top_height * call.top_width * (call.channels / width);
  }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const int64_t c = int64_t{by_vectors.split(item)} * width;
    const int64_t x = by_width.split(item), y = by_height.split(item), n = item;
    const Strides &in = this->grad_strides, &to = this->top_strides;
    const T* fine = this->grad + n * in.n + 2 * y * in.y + 2 * x * in.x + c;
    const Vector<T> north_west = load(fine), north_east = load(fine + in.x);
    const Vector<T> south_west = load(fine + in.y), south_east = load(fine + in.y + in.x);
    SumOf<T> sums[width];
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sums[i] = this->gain *
          ((widened(north_west.values[i]) + widened(south_west.values[i])) +
           (widened(north_east.values[i]) + widened(south_east.values[i])));
    }
    Vector<T> result;
    round_to(result, sums);
    store(this->grad_top + n * to.n + y * to.y + x * to.x + c, result);
  }
};

// NCHW at ratio 2: two accesses in each of two fine rows per access of coarse pixels.
template <class T>
struct NchwDoubledAdjoint : Adjoint<T> {
  static constexpr int width = Vector<T>::width;
  FastDivide by_vectors, by_height, by_channels;

  explicit NchwDoubledAdjoint(const UpsampleAddBackward& call)
      : Adjoint<T>(call), by_vectors(call.top_width / width), by_height(call.top_height), by_channels(call.channels) {}

  static int64_t items(const UpsampleAddBackward& call) {
    return call.batch * call.channels * call.top_height * (call.top_width / width);
  }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const int64_t x = int64_t{by_vectors.split(item)} * width;
    const int64_t y = by_height.split(item), c = by_channels.split(item), n = item;
    const Strides &in = this->grad_strides, &to = this->top_strides;
    const T* fine = this->grad + n * in.n + c * in.c + 2 * y * in.y + 2 * x;
    const Vector<T> upper[2] = {load(fine), load(fine + width)};
    const Vector<T> lower[2] = {load(fine + in.y), load(fine + in.y + width)};
    SumOf<T> columns[2 * width], sums[width];
#pragma unroll
    for (int i = 0; i < 2 * width; ++i) {
      columns[i] = widened(upper[i / width].values[i % width]) + widened(lower[i / width].values[i % width]);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] = this->gain * (columns[2 * i] + columns[2 * i + 1]);
    Vector<T> result;
    round_to(result, sums);
    store(this->grad_top + n * to.n + c * to.c + y * to.y + x, result);
  }
};

// NHWC at any ratio.
template <class T, bool bilinear>
struct NhwcAdjoint : Adjoint<T, GatherSum<T, bilinear>> {
  using Sum = GatherSum<T, bilinear>;
  static constexpr int width = Vector<T>::width;
  FastDivide by_vectors, by_width, by_height;
  typename AxisOf<T, bilinear, int32_t>::type rows, columns;

  explicit NhwcAdjoint(const UpsampleAddBackward& call)
      : Adjoint<T, Sum>(call),
        by_vectors(call.channels / width),
        by_width(call.top_width),
        by_height(call.top_height),
        rows(call.top_height, call.grad.height, call.mode),
        columns(call.top_width, call.grad.width, call.mode) {}

  static int64_t items(const UpsampleAddBackward& call) { return NhwcDoubledAdjoint<T>::items(call); }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const int64_t c = int64_t{by_vectors.split(item)} * width;
    const int32_t x = static_cast<int32_t>(by_width.split(item)), y = static_cast<int32_t>(by_height.split(item));
    const int64_t n = item;
    const Strides &in = this->grad_strides, &to = this->top_strides;
    const T* fine = this->grad + n * in.n + c;
    const int32_t top = rows.begin(y), bottom = rows.end(y), left = columns.begin(x), right = columns.end(x);
    Sum sums[width] = {};
    for (int32_t column = left; column < right; ++column) {
      Sum down[width] = {};
      for (int32_t row = top; row < bottom; ++row) {
        const Vector<T> read = load(fine + row * in.y + column * in.x);
        if constexpr (bilinear) {
          const Sum weight = rows.weight(row, y);
#pragma unroll
          for (int i = 0; i < width; ++i) down[i] += weight * static_cast<Sum>(read.values[i]);
        } else {
#pragma unroll
          for (int i = 0; i < width; ++i) down[i] += static_cast<Sum>(read.values[i]);
        }
      }
      Sum weight = 1;
      if constexpr (bilinear) weight = columns.weight(column, x);
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i] += bilinear ? weight * down[i] : down[i];
    }
    SumOf<T> scaled[width];
#pragma unroll
    for (int i = 0; i < width; ++i) scaled[i] = static_cast<SumOf<T>>(this->gain * sums[i]);
    Vector<T> result;
    round_to(result, scaled);
    store(this->grad_top + n * to.n + y * to.y + x * to.x + c, result);
  }
};

// Any strides, a few channels per thread: they share the indices, which cost more than a sum of four.
template <class T, bool bilinear, class Count>
struct StridedAdjoint : Adjoint<T, GatherSum<T, bilinear>> {
  using Sum = GatherSum<T, bilinear>;
  using Index = typename Count::Index;
  using Pixel = std::make_signed_t<Index>;
  static constexpr int channels_each = 4;
  typename Count::Divide inner, middle, outer;
  typename AxisOf<T, bilinear, Pixel>::type rows, columns;
  Pixel channels, groups;
  bool channels_last;

  explicit StridedAdjoint(const UpsampleAddBackward& call)
      : Adjoint<T, Sum>(call),
        inner(channels_come_last(call) ? groups_of(call) : call.top_width),
        middle(channels_come_last(call) ? call.top_width : call.top_height),
        outer(channels_come_last(call) ? call.top_height : groups_of(call)),
        rows(call.top_height, call.grad.height, call.mode),
        columns(call.top_width, call.grad.width, call.mode),
        channels(static_cast<Pixel>(call.channels)),
        groups(static_cast<Pixel>(groups_of(call))),
        channels_last(channels_come_last(call)) {}

  static bool channels_come_last(const UpsampleAddBackward& call) { return call.grad_top.stride_x != 1; }
  static int64_t groups_of(const UpsampleAddBackward& call) {
    return (call.channels + channels_each - 1) / channels_each;
  }
  static int64_t items(const UpsampleAddBackward& call) {
    return call.batch * groups_of(call) * call.top_height * call.top_width;
  }

  FPN_HOST_DEVICE void operator()(Index item) const {
    const Pixel first = inner.split(item), second = middle.split(item), third = outer.split(item), n = item;
    const Pixel group = channels_last ? first : third, y = channels_last ? third : second;
    const Pixel x = channels_last ? second : first;
    const Strides &in = this->grad_strides, &to = this->top_strides;
    // A thread's channels are `groups` apart, so that neighbouring threads have neighbouring channels.
    const T* fine = this->grad + n * in.n + group * in.c;
    const int64_t step = groups * in.c;
    const Pixel top = rows.begin(y), bottom = rows.end(y), left = columns.begin(x), right = columns.end(x);
    Sum sums[channels_each] = {};
    for (Pixel column = left; column < right; ++column) {
      Sum down[channels_each] = {};
      // nvcc 13.0 would unroll by four and spill registers (float64, 64-bit counts, sm_100).
#pragma unroll 2
      for (Pixel row = top; row < bottom; ++row) {
        const T* pixel = fine + row * in.y + column * in.x;
        Sum weight = 1;
        if constexpr (bilinear) weight = rows.weight(row, y);
#pragma unroll
        for (int k = 0; k < channels_each; ++k) {
          if (group + k * groups >= channels) continue;
          const Sum value = static_cast<Sum>(element_at(pixel + k * step));
          down[k] += bilinear ? weight * value : value;
        }
      }
      Sum weight = 1;
      if constexpr (bilinear) weight = columns.weight(column, x);
#pragma unroll
      for (int k = 0; k < channels_each; ++k) sums[k] += bilinear ? weight * down[k] : down[k];
    }
    T* target = this->grad_top + n * to.n + group * to.c + y * to.y + x * to.x;
#pragma unroll
    for (int k = 0; k < channels_each; ++k) {
      if (group + k * groups >= channels) continue;
      target[k * groups * to.c] = static_cast<T>(static_cast<SumOf<T>>(this->gain * sums[k]));
    }
  }
};

inline Path path_of(const UpsampleAddBackward& call) {
  const Shape coarse = call.coarse(), fine = call.fine();
  const int64_t element = element_size(call.dtype), width = access_bytes / element;
  const int64_t count = coarse.batch * coarse.channels * coarse.height * coarse.width;
  if (!counts_in_32_bits({coarse.height, coarse.width, fine.height, fine.width, coarse.channels, count / width})) {
    return Path::strided;
  }
  const bool doubled = call.mode != Mode::bilinear && doubles(coarse.height, fine.height) &&
      doubles(coarse.width, fine.width);
  if (has_channel_vectors(call.grad, fine, element) && has_channel_vectors(call.grad_top, coarse, element)) {
    return doubled ? Path::nhwc_doubled : Path::nhwc;
  }
  if (doubled && has_row_vectors(call.grad, fine, element, width) &&
      has_row_vectors(call.grad_top, coarse, element, width)) {
    return Path::nchw_doubled;
  }
  return Path::strided;
}

template <class T, bool bilinear, class Launch>
void run_general(const UpsampleAddBackward& call, Path path, const Launch& launch) {
  if (path == Path::nhwc) return launch(NhwcAdjoint<T, bilinear>(call), NhwcAdjoint<T, bilinear>::items(call));
  using Smaller = StridedAdjoint<T, bilinear, Small>;
  using Larger = StridedAdjoint<T, bilinear, Large>;
  const int64_t items = Smaller::items(call);
  if (counts_in_32_bits({items, call.channels + 4, call.grad.height, call.grad.width})) {
    return launch(Smaller(call), items);
  }
  return launch(Larger(call), items);
}

// Calls launch(code of a thread, number of threads) for a path.
template <class T, class Launch>
void run(const UpsampleAddBackward& call, Path path, const Launch& launch) {
  if (path == Path::nhwc_doubled) return launch(NhwcDoubledAdjoint<T>(call), NhwcDoubledAdjoint<T>::items(call));
  if (path == Path::nchw_doubled) return launch(NchwDoubledAdjoint<T>(call), NchwDoubledAdjoint<T>::items(call));
  if (call.mode == Mode::bilinear) return run_general<T, true>(call, path, launch);
  return run_general<T, false>(call, path, launch);
}

}  // namespace fpn::cuda
