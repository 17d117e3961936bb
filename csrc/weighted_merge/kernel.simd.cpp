#include <optional>

#include "kernel.h"

#include "../simd/map_rows.h"
#include "../simd/vectors.h"

namespace {

using fpn::cpu::WeightedMap;
using fpn::cpu::WeightedMerge;
using fpn::cpu::line_bytes;

constexpr int64_t max_inputs = 3;

// A line of one input: in the map's dtype, or, if it was resized, in the dtype of the sums.
template <class T, class A>
struct Line {
  const T* plain = nullptr;
  const A* resized = nullptr;
};

template <class V>
inline V weighted_sum(const V* factors, V first, V second) {
  return factors[0] * first + factors[1] * second;
}
template <class V>
inline V weighted_sum(const V* factors, V first, V second, V third) {
  return (factors[0] * first + factors[1] * second) + factors[2] * third;
}

template <bool streaming, class T, class V, class... Lines>
inline void sum_lines(T* out, int64_t count, const V* factors, const Lines*... lines) {
  over<V>(count, [&](int64_t i, auto extent) {
    put<streaming>(out + i, weighted_sum(factors, load(lines + i, extent)...), extent);
  });
}

// The sum of one line of each input.
template <bool streaming, class T, class V>
inline void merge_lines(
    T* out, int64_t count, int64_t inputs, const V* factors, const Line<T, typename V::Scalar>* lines) {
  const T* first = lines[0].plain;
  const auto with = [&](auto second) {
    if (inputs == 2) {
      sum_lines<streaming>(out, count, factors, first, second);
    } else if (lines[2].resized == nullptr) {
      sum_lines<streaming>(out, count, factors, first, second, lines[2].plain);
    } else {
      sum_lines<streaming>(out, count, factors, first, second, lines[2].resized);
    }
  };
  if (lines[1].resized == nullptr) {
    with(lines[1].plain);
  } else {
    with(lines[1].resized);
  }
}

template <class V>
void broadcast_factors(const WeightedMerge& call, V* factors) {
  for (int64_t k = 0; k < call.count; ++k) {
    factors[k] = broadcast<V>(static_cast<typename V::Scalar>(call.inputs[k].factor));
  }
}

template <class T, bool streaming>
void nchw_rows(const WeightedMerge& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  using A = typename V::Scalar;
  const int64_t width = call.width, height = call.height;
  V factors[max_inputs];
  broadcast_factors(call, factors);
  std::optional<ResizedRows<T, V>> resized[max_inputs];
  std::byte* buffers[max_inputs];
  for (int64_t k = 0; k < call.count; ++k) {
    const WeightedMap& input = call.inputs[k];
    if (input.resized) resized[k].emplace(input.map, input.rows, input.columns, width, scratch);
    buffers[k] = scratch;
    if (!input.resized || call.bilinear) scratch += line_bytes(width, input.resized ? 8 : sizeof(T));
  }
  int64_t plane = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % height, n = unit / height / call.channels, c = unit / height % call.channels;
    const bool enters = unit / height != plane;
    plane = unit / height;
    Line<T, A> lines[max_inputs];
    for (int64_t k = 0; k < call.count; ++k) {
      const WeightedMap& input = call.inputs[k];
      if (!input.resized) {
        const T* from = row<T>(input.map, n, y) + c * input.map.stride_c;
        lines[k].plain = packed(from, input.map.stride_x, width, reinterpret_cast<T*>(buffers[k]));
        continue;
      }
      if (enters) resized[k]->enter(n, c);
      resized[k]->hold(y);
      lines[k].resized = resized[k]->lower();
      if (!call.bilinear) continue;
      const A *lower = resized[k]->lower(), *upper = resized[k]->upper();
      A* blended = reinterpret_cast<A*>(buffers[k]);
      const A weight = weights(input.rows, A())[y];
      const V high = broadcast<V>(weight), low = broadcast<V>(1 - weight);
      over<V>(width, [&](int64_t i, auto extent) {
        store(blended + i, low * load(lower + i, extent) + high * load(upper + i, extent), extent);
      });
      lines[k].resized = blended;
    }
    merge_lines<streaming>(row<T>(call.out, n, y) + c * call.out.stride_c, width, call.count, factors, lines);
  }
}

// One row of an input in NHWC.
template <class T, class A>
struct PixelRow {
  const T* lower;
  const T* upper = nullptr;  // bilinear: the row below
  int64_t stride_x = 0, upper_stride_x = 0;
  const int32_t* source = nullptr;  // source columns of a resized row
};

// The channels of a bilinear pixel, into `to`.
template <class T, class V>
const typename V::Scalar* blended_pixel(
    const WeightedMap& input,
    const PixelRow<T, typename V::Scalar>& from,
    int64_t x,
    typename V::Scalar row_weight,
    int64_t channels,
    typename V::Scalar* to) {
  using A = typename V::Scalar;
  const int64_t left = input.columns.lower[x], right = input.columns.upper[x];
  const T *above_left = from.lower + left * from.stride_x, *above_right = from.lower + right * from.stride_x;
  const T* below_left = from.upper + left * from.upper_stride_x;
  const T* below_right = from.upper + right * from.upper_stride_x;
  const A column_weight = weights(input.columns, A())[x];
  const V rightwards = broadcast<V>(column_weight), leftwards = broadcast<V>(1 - column_weight);
  const V high = broadcast<V>(row_weight), low = broadcast<V>(1 - row_weight);
  over<V>(channels, [&](int64_t i, auto extent) {
    const V above = leftwards * load(above_left + i, extent) + rightwards * load(above_right + i, extent);
    const V below = leftwards * load(below_left + i, extent) + rightwards * load(below_right + i, extent);
    store(to + i, low * above + high * below, extent);
  });
  return to;
}

template <class T, bool streaming>
void nhwc_rows(const WeightedMerge& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  using A = typename V::Scalar;
  const int64_t width = call.width, height = call.height, channels = call.channels;
  V factors[max_inputs];
  broadcast_factors(call, factors);
  T *staged[max_inputs], *staged_next[max_inputs];
  A* blended[max_inputs];
  for (int64_t k = 0; k < call.count; ++k) {
    const WeightedMap& input = call.inputs[k];
    const int64_t line = input.map.stride_c == 1 ? 0 : line_bytes(input.map.width * channels, sizeof(T));
    staged[k] = reinterpret_cast<T*>(scratch);
    scratch += line;
    if (!input.resized || !call.bilinear) continue;
    staged_next[k] = reinterpret_cast<T*>(scratch);
    blended[k] = reinterpret_cast<A*>(scratch += line);
    scratch += line_bytes(channels, 8);
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / height, y = unit % height;
    PixelRow<T, A> from[max_inputs];
    bool one_line = true;  // the rows of all inputs are contiguous, like the result's
    for (int64_t k = 0; k < call.count; ++k) {
      const WeightedMap& input = call.inputs[k];
      const int64_t source = input.resized ? input.rows.lower[y] : y;
      from[k].lower = packed_row(input.map, n, source, channels, from[k].stride_x, staged[k]);
      one_line = one_line && !input.resized && from[k].stride_x == channels;
      if (!input.resized) continue;
      from[k].source = input.columns.lower;
      if (!call.bilinear) continue;
      from[k].upper =
          packed_row(input.map, n, input.rows.upper[y], channels, from[k].upper_stride_x, staged_next[k]);
    }
    T* out = row<T>(call.out, n, y);
    Line<T, A> lines[max_inputs];
    if (one_line) {
      for (int64_t k = 0; k < call.count; ++k) lines[k].plain = from[k].lower;
      merge_lines<streaming>(out, width * channels, call.count, factors, lines);
      continue;
    }
    for (int64_t x = 0; x < width; ++x, out += channels) {
      for (int64_t k = 0; k < call.count; ++k) {
        const WeightedMap& input = call.inputs[k];
        if (from[k].upper != nullptr) {
          const A weight = weights(input.rows, A())[y];
          lines[k].resized = blended_pixel<T, V>(input, from[k], x, weight, channels, blended[k]);
        } else {
          lines[k].plain = from[k].lower + (from[k].source == nullptr ? x : from[k].source[x]) * from[k].stride_x;
        }
      }
      merge_lines<streaming>(out, channels, call.count, factors, lines);
    }
  }
}

template <class T, bool streaming>
void rows(const WeightedMerge& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.channels_last ? nhwc_rows<T, streaming> : nchw_rows<T, streaming>)(call, begin, end, scratch);
  if (streaming) end_of_stream();
}

template <class T>
void rows(const WeightedMerge& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.streaming ? rows<T, true> : rows<T, false>)(call, begin, end, scratch);
}

}  // namespace

namespace fpn::cpu::FPN_ISA {

void weighted_merge_rows(const WeightedMerge& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element(call.dtype, [&](auto element) { rows<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
