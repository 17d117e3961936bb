// out = gain * (lateral + resize(top)): the code of one thread on each path, and the choice of the path.
//
// Compiles for the host as well, so that tests/cuda/ runs every path without a GPU.
#pragma once

#include <type_traits>

#include "axis.h"
#include "fast_divide.h"
#include "geometry.h"

namespace fpn::cuda {

struct UpsampleAdd {
  Dtype dtype;
  Map top, lateral;
  Result out;
  int64_t batch, channels;
  Mode mode;
  double gain;

  Shape coarse() const { return {batch, channels, top.height, top.width}; }
  Shape fine() const { return {batch, channels, lateral.height, lateral.width}; }
};

// The fields that all paths share.
template <class T>
struct Merge {
  const T* top;
  const T* lateral;
  T* out;
  Strides top_strides, lateral_strides, out_strides;
  SumOf<T> gain;

  explicit Merge(const UpsampleAdd& call)
      : top(static_cast<const T*>(call.top.data)),
        lateral(static_cast<const T*>(call.lateral.data)),
        out(static_cast<T*>(call.out.data)),
        top_strides(strides_of(call.top, call.coarse())),
        lateral_strides(strides_of(call.lateral, call.fine())),
        out_strides(strides_of(call.out, call.fine())),
        gain(static_cast<SumOf<T>>(call.gain)) {}

  FPN_HOST_DEVICE SumOf<T> merged(SumOf<T> fine, SumOf<T> coarse) const { return gain * (fine + coarse); }
};

// NHWC at ratio 2: four fine vectors per coarse vector, all loaded before the first is used.
template <class T>
struct NhwcDoubledMerge : Merge<T> {
  static constexpr int width = Vector<T>::width;
  FastDivide by_vectors, by_width, by_height;

  explicit NhwcDoubledMerge(const UpsampleAdd& call)
      : Merge<T>(call), by_vectors(call.channels / width), by_width(call.top.width), by_height(call.top.height) {}

  static int64_t items(const UpsampleAdd& call) {
    return call.batch * call.top.height * call.top.width * (call.channels / width);
  }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const int64_t c = int64_t{by_vectors.split(item)} * width;
    const int64_t x = by_width.split(item), y = by_height.split(item), n = item;
    const Strides &in = this->lateral_strides, &to = this->out_strides, &up = this->top_strides;
    const T* fine = this->lateral + n * in.n + 2 * y * in.y + 2 * x * in.x + c;
    T* out = this->out + n * to.n + 2 * y * to.y + 2 * x * to.x + c;
    const Vector<T> coarse = load(this->top + n * up.n + y * up.y + x * up.x + c);
    const Vector<T> read[4] = {load(fine), load(fine + in.x), load(fine + in.y), load(fine + in.y + in.x)};
    T* const targets[4] = {out, out + to.x, out + to.y, out + to.y + to.x};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      SumOf<T> sums[width];
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i] = this->merged(widened(read[k].values[i]), widened(coarse.values[i]));
      Vector<T> result;
      round_to(result, sums);
      store(targets[k], result);
    }
  }
};

// NHWC at any ratio: a few pixels of a row per thread.
template <class T, bool bilinear>
struct NhwcMerge : Merge<T> {
  static constexpr int width = Vector<T>::width;
  static constexpr int pixels = bilinear ? 2 : 4;
  FastDivide by_vectors, by_groups, by_height;
  typename AxisOf<T, bilinear, int32_t>::type rows, columns;

  explicit NhwcMerge(const UpsampleAdd& call)
      : Merge<T>(call),
        by_vectors(call.channels / width),
        by_groups(groups(call)),
        by_height(call.lateral.height),
        rows(call.top.height, call.lateral.height, call.mode),
        columns(call.top.width, call.lateral.width, call.mode) {}

  static int64_t groups(const UpsampleAdd& call) { return (call.lateral.width + pixels - 1) / pixels; }
  static int64_t items(const UpsampleAdd& call) {
    return call.batch * call.lateral.height * groups(call) * (call.channels / width);
  }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const int64_t c = int64_t{by_vectors.split(item)} * width;
    const int32_t first = static_cast<int32_t>(by_groups.split(item)) * pixels;
    const int32_t y = static_cast<int32_t>(by_height.split(item));
    const int64_t n = item;
    const Strides &in = this->lateral_strides, &to = this->out_strides, &up = this->top_strides;
    const T* fine = this->lateral + n * in.n + y * in.y + c;
    const T* coarse = this->top + n * up.n + c;
    T* out = this->out + n * to.n + y * to.y + c;
    Vector<T> read[pixels];
    SumOf<T> resized[pixels][width];
    if constexpr (bilinear) {
      const auto row = rows.source(y);
#pragma unroll
      for (int p = 0; p < pixels; ++p) {
        const int32_t x = first + p;
        if (x >= columns.out_size) continue;
        read[p] = load(fine + x * in.x);
        const auto column = columns.source(x);
        const Vector<T> north_west = load(coarse + row.lower * up.y + column.lower * up.x);
        const Vector<T> north_east = load(coarse + row.lower * up.y + column.upper * up.x);
        const Vector<T> south_west = load(coarse + row.upper * up.y + column.lower * up.x);
        const Vector<T> south_east = load(coarse + row.upper * up.y + column.upper * up.x);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const SumOf<T> above =
              (1 - column.weight) * widened(north_west.values[i]) + column.weight * widened(north_east.values[i]);
          const SumOf<T> below =
              (1 - column.weight) * widened(south_west.values[i]) + column.weight * widened(south_east.values[i]);
          resized[p][i] = (1 - row.weight) * above + row.weight * below;
        }
      }
    } else {
      coarse += rows.source(y) * up.y;
      Vector<T> nearest[pixels];
#pragma unroll
      for (int p = 0; p < pixels; ++p) {
        const int32_t x = first + p;
        if (x >= columns.out_size) continue;
        read[p] = load(fine + x * in.x);
        nearest[p] = load(coarse + columns.source(x) * up.x);
      }
#pragma unroll
      for (int p = 0; p < pixels; ++p) {
#pragma unroll
        for (int i = 0; i < width; ++i) resized[p][i] = widened(nearest[p].values[i]);
      }
    }
#pragma unroll
    for (int p = 0; p < pixels; ++p) {
      const int32_t x = first + p;
      if (x >= columns.out_size) continue;
      SumOf<T> sums[width];
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i] = this->merged(widened(read[p].values[i]), resized[p][i]);
      Vector<T> result;
      round_to(result, sums);
      store(out + x * to.x, result);
    }
  }
};

// NCHW at ratio 2: half an access of coarse pixels, one access in each of two fine rows.
template <class T>
struct NchwDoubledMerge : Merge<T> {
  static constexpr int width = Vector<T>::width;
  FastDivide by_vectors, by_height, by_channels;

  explicit NchwDoubledMerge(const UpsampleAdd& call)
      : Merge<T>(call),
        by_vectors(call.lateral.width / width),
        by_height(call.top.height),
        by_channels(call.channels) {}

  static int64_t items(const UpsampleAdd& call) {
    return call.batch * call.channels * call.top.height * (call.lateral.width / width);
  }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const int64_t x = int64_t{by_vectors.split(item)} * width;
    const int64_t y = by_height.split(item), c = by_channels.split(item), n = item;
    const Strides &in = this->lateral_strides, &to = this->out_strides, &up = this->top_strides;
    const T* fine = this->lateral + n * in.n + c * in.c + 2 * y * in.y + x;
    T* out = this->out + n * to.n + c * to.c + 2 * y * to.y + x;
    const auto coarse = load<access_bytes / 2>(this->top + n * up.n + c * up.c + y * up.y + x / 2);
    const Vector<T> read[2] = {load(fine), load(fine + in.y)};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      SumOf<T> sums[width];
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i] = this->merged(widened(read[k].values[i]), widened(coarse.values[i / 2]));
      Vector<T> result;
      round_to(result, sums);
      store(out + k * to.y, result);
    }
  }
};

// The row, or two rows, of the top that a fine row reads, of one channel.
template <class T, bool bilinear, class Index>
struct TopRow {
  using Axis = typename AxisOf<T, bilinear, Index>::type;
  const T* row;

  FPN_HOST_DEVICE TopRow(const T* plane, const Strides& up, const Axis& rows, Index y)
      : row(plane + rows.source(y) * up.y) {}
  FPN_HOST_DEVICE SumOf<T> at(const Strides& up, const Axis& columns, Index x) const {
    return element_at(row + columns.source(x) * up.x);
  }
};
template <class T, class Index>
struct TopRow<T, true, Index> {
  using Axis = typename AxisOf<T, true, Index>::type;
  const T *above, *below;
  SumOf<T> weight;  // of the one below

  FPN_HOST_DEVICE TopRow(const T* plane, const Strides& up, const Axis& rows, Index y) {
    const auto row = rows.source(y);
    above = plane + row.lower * up.y;
    below = plane + row.upper * up.y;
    weight = row.weight;
  }
  FPN_HOST_DEVICE SumOf<T> at(const Strides& up, const Axis& columns, Index x) const {
    const auto column = columns.source(x);
    const int64_t left = column.lower * up.x, right = column.upper * up.x;
    const SumOf<T> leftwards = 1 - column.weight;
    return (1 - weight) * (leftwards * element_at(above + left) + column.weight * element_at(above + right)) +
        weight * (leftwards * element_at(below + left) + column.weight * element_at(below + right));
  }
};

// Dense NCHW at any ratio and width: accesses cross the ends of rows and planes.
template <class T, bool bilinear>
struct NchwMerge : Merge<T> {
  static constexpr int width = Vector<T>::width;
  FastDivide by_width, by_height, by_channels;
  typename AxisOf<T, bilinear, int32_t>::type rows, columns;
  int32_t batch, channels;
  uint32_t elements;

  explicit NchwMerge(const UpsampleAdd& call)
      : Merge<T>(call),
        by_width(call.lateral.width),
        by_height(call.lateral.height),
        by_channels(call.channels),
        rows(call.top.height, call.lateral.height, call.mode),
        columns(call.top.width, call.lateral.width, call.mode),
        batch(static_cast<int32_t>(call.batch)),
        channels(static_cast<int32_t>(call.channels)),
        elements(static_cast<uint32_t>(count(call))) {}

  static int64_t count(const UpsampleAdd& call) {
    return call.batch * call.channels * call.lateral.height * call.lateral.width;
  }
  static int64_t items(const UpsampleAdd& call) { return (count(call) + width - 1) / width; }

  FPN_HOST_DEVICE void operator()(uint32_t item) const {
    const uint32_t first = item * width;
    uint32_t rest = first;
    int32_t x = static_cast<int32_t>(by_width.split(rest)), y = static_cast<int32_t>(by_height.split(rest));
    int32_t c = static_cast<int32_t>(by_channels.split(rest)), n = static_cast<int32_t>(rest);
    const Strides& up = this->top_strides;
    const bool whole = elements - first >= static_cast<uint32_t>(width);
    Vector<T> read;
    if (whole) read = load(this->lateral + first);
    SumOf<T> resized[width];
    TopRow<T, bilinear, int32_t> row(this->top + n * up.n + c * up.c, up, rows, y);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (!whole && first + i >= elements) continue;
      resized[i] = row.at(up, columns, x);
      if (++x < columns.out_size) continue;
      x = 0;
      if (++y == rows.out_size) {
        y = 0;
        if (++c == channels) {
          c = 0;
          n = n + 1 < batch ? n + 1 : 0;  // beyond the last element nothing is read
        }
      }
      row = TopRow<T, bilinear, int32_t>(this->top + n * up.n + c * up.c, up, rows, y);
    }
    if (!whole) {
      for (int i = 0; i < width; ++i) {
        if (first + i >= elements) break;
        this->out[first + i] = static_cast<T>(this->merged(element_at(this->lateral + first + i), resized[i]));
      }
      return;
    }
    SumOf<T> sums[width];
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] = this->merged(widened(read.values[i]), resized[i]);
    Vector<T> result;
    round_to(result, sums);
    store(this->out + first, result);
  }
};

// Any strides, element by element, in the memory order of the result.
template <class T, bool bilinear, class Count>
struct StridedMerge : Merge<T> {
  using Index = typename Count::Index;
  using Pixel = std::make_signed_t<Index>;
  typename Count::Divide inner, middle, outer;
  typename AxisOf<T, bilinear, Pixel>::type rows, columns;
  bool channels_last;

  explicit StridedMerge(const UpsampleAdd& call)
      : Merge<T>(call),
        inner(channels_come_last(call) ? call.channels : call.lateral.width),
        middle(channels_come_last(call) ? call.lateral.width : call.lateral.height),
        outer(channels_come_last(call) ? call.lateral.height : call.channels),
        rows(call.top.height, call.lateral.height, call.mode),
        columns(call.top.width, call.lateral.width, call.mode),
        channels_last(channels_come_last(call)) {}

  static bool channels_come_last(const UpsampleAdd& call) { return call.out.stride_x != 1; }
  static int64_t items(const UpsampleAdd& call) { return NchwMerge<T, bilinear>::count(call); }

  FPN_HOST_DEVICE void operator()(Index item) const {
    const Pixel first = inner.split(item), second = middle.split(item), third = outer.split(item), n = item;
    const Pixel c = channels_last ? first : third, y = channels_last ? third : second;
    const Pixel x = channels_last ? second : first;
    const Strides &in = this->lateral_strides, &to = this->out_strides, &up = this->top_strides;
    const TopRow<T, bilinear, Pixel> row(this->top + n * up.n + c * up.c, up, rows, y);
    const SumOf<T> resized = row.at(up, columns, x);
    const SumOf<T> fine = element_at(this->lateral + n * in.n + c * in.c + y * in.y + x * in.x);
    this->out[n * to.n + c * to.c + y * to.y + x * to.x] = static_cast<T>(this->merged(fine, resized));
  }
};

inline Path path_of(const UpsampleAdd& call) {
  const Shape coarse = call.coarse(), fine = call.fine();
  const int64_t element = element_size(call.dtype), width = access_bytes / element;
  const int64_t count = fine.batch * fine.channels * fine.height * fine.width;
  if (!counts_in_32_bits({coarse.height, coarse.width, fine.height, fine.width, fine.channels, count / width})) {
    return Path::strided;
  }
  const bool doubled = call.mode != Mode::bilinear && doubles(coarse.height, fine.height) &&
      doubles(coarse.width, fine.width);
  if (has_channel_vectors(call.top, coarse, element) && has_channel_vectors(call.lateral, fine, element) &&
      has_channel_vectors(call.out, fine, element)) {
    return doubled ? Path::nhwc_doubled : Path::nhwc;
  }
  if (doubled && has_row_vectors(call.top, coarse, element, width / 2) &&
      has_row_vectors(call.lateral, fine, element, width) && has_row_vectors(call.out, fine, element, width)) {
    return Path::nchw_doubled;
  }
  if (counts_in_32_bits({count}) && is_flat(call.lateral, fine, element) && is_flat(call.out, fine, element)) {
    return Path::nchw;
  }
  return Path::strided;
}

template <class T, bool bilinear, class Launch>
void run_general(const UpsampleAdd& call, Path path, const Launch& launch) {
  switch (path) {
    case Path::nhwc: return launch(NhwcMerge<T, bilinear>(call), NhwcMerge<T, bilinear>::items(call));
    case Path::nchw: return launch(NchwMerge<T, bilinear>(call), NchwMerge<T, bilinear>::items(call));
    default: break;
  }
  using Smaller = StridedMerge<T, bilinear, Small>;
  using Larger = StridedMerge<T, bilinear, Large>;
  const int64_t items = Smaller::items(call);
  if (counts_in_32_bits({items, call.top.height, call.top.width})) return launch(Smaller(call), items);
  return launch(Larger(call), items);
}

// Calls launch(code of a thread, number of threads) for a path.
template <class T, class Launch>
void run(const UpsampleAdd& call, Path path, const Launch& launch) {
  if (path == Path::nhwc_doubled) return launch(NhwcDoubledMerge<T>(call), NhwcDoubledMerge<T>::items(call));
  if (path == Path::nchw_doubled) return launch(NchwDoubledMerge<T>(call), NchwDoubledMerge<T>::items(call));
  if (call.mode == Mode::bilinear) return run_general<T, true>(call, path, launch);
  return run_general<T, false>(call, path, launch);
}

}  // namespace fpn::cuda
