// A gather: each coarse pixel sums the fine pixels that read it, rows first, always in the same order.

#include "backward_kernel.h"

#include "../simd/map_rows.h"
#include "../simd/vectors.h"

namespace {

using fpn::cpu::AdjointAxis;
using fpn::cpu::UpsampleAddBackward;
using fpn::cpu::line_bytes;

inline const float* weights(const AdjointAxis& axis, float) { return axis.weight; }
inline const double* weights(const AdjointAxis& axis, double) { return axis.weight64; }

// Loads a vector of type V from a map; float32 elements are widened if V is Doubles.
template <class V, class T>
inline V fetch(const T* from, Whole) {
  if constexpr (std::is_same<T, float>::value && std::is_same<V, Doubles>::value) {
    return load_wide(from);
  } else {
    return load(from);
  }
}
template <class V, class T>
inline V fetch(const T* from, Part part) {
  T padded[V::width] = {};
  for (int i = 0; i < part.count; ++i) padded[i] = from[i];
  return fetch<V>(padded, Whole{});
}

// Stores a result, plus the upstream gradient if there is one.
template <class V, class T, class Extent>
inline void finish(T* out, const T* upstream, int64_t i, V value, Extent extent) {
  store(out + i, upstream == nullptr ? value : fetch<V>(upstream + i, extent) + value, extent);
}

// The upstream gradient of the result at `out`, or null.
template <class T>
inline const T* upstream_at(const UpsampleAddBackward& call, const T* out) {
  const int64_t offset = out - static_cast<const T*>(call.grad_top.data);
  return call.upstream == nullptr ? nullptr : static_cast<const T*>(call.upstream) + offset;
}

template <class V, class T, class Extent>
inline V weighted_or_plain(const T* from, typename V::Scalar weight, bool plain, Extent extent) {
  const V value = fetch<V>(from, extent);
  return plain ? value : broadcast<V>(weight) * value;
}

// sums[i] += the sum of the values, in float64, for the lanes of the extent.
inline void add_to_sums(double* sums, Part part, Doubles value) {
  store(sums, load(sums, part) + value, part);
}
inline void add_to_sums(double* sums, Whole, Doubles value) { store(sums, load(sums) + value); }
template <class... Values>
inline void add_to_sums(double* sums, Whole, Floats first, Values... others) {
  store(sums, load(sums) + (low_half(first) + ... + low_half(others)));
  store(sums + 8, load(sums + 8) + (high_half(first) + ... + high_half(others)));
}
template <class... Values>
inline void add_to_sums(double* sums, Part part, Floats first, Values... others) {
  double lanes[Floats::width] = {};
  add_to_sums(lanes, Whole{}, first, others...);
  for (int i = 0; i < part.count; ++i) sums[i] += lanes[i];
}

// The bias sums of float32 maps add single pixels: partial sums in float32 were less exact than eager's.
template <class T>
constexpr bool sums_pixels = std::is_same<T, float>::value;

template <class T, class V>
void nchw_rows(const UpsampleAddBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  using A = typename V::Scalar;
  const int64_t width = call.grad.width, top_width = call.top_width;
  A* summed = reinterpret_cast<A*>(scratch);
  T* line = reinterpret_cast<T*>(scratch += line_bytes(width, sizeof(A)));
  const V gain = broadcast<V>(static_cast<A>(call.gain));
  const A* row_weights = weights(call.rows, A());
  const A* column_weights = weights(call.columns, A());
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / call.top_height, s = unit % call.top_height;
    const int64_t n = plane / call.channels, c = plane % call.channels;
    const T* grad = static_cast<const T*>(call.grad.data) + n * call.grad.stride_n + c * call.grad.stride_c;
    T* out = static_cast<T*>(call.grad_top.data) + n * call.grad_top.stride_n + c * call.grad_top.stride_c +
        s * call.grad_top.stride_y;
    const T* upstream = upstream_at<T>(call, out);
    const int64_t first = call.rows.begin[s], count = call.rows.count[s];
    if (count == 0) {
      over<V>(width, [&](int64_t i, auto extent) { store(summed + i, broadcast<V>(0), extent); });
    }
    if (count == 2 && !call.bilinear && call.grad.stride_x == 1) {
      const T* one = grad + first * call.grad.stride_y;
      const T* two = one + call.grad.stride_y;
      over<V>(width, [&](int64_t i, auto extent) {
        store(summed + i, fetch<V>(one + i, extent) + fetch<V>(two + i, extent), extent);
      });
    } else {
      for (int64_t k = 0; k < count; ++k) {
        const T* from = packed(grad + (first + k) * call.grad.stride_y, call.grad.stride_x, width, line);
        const A weight = row_weights[k * call.top_height + s];
        over_once<V>(width, [&](int64_t i, auto extent) {
          const V term = weighted_or_plain<V>(from + i, weight, !call.bilinear, extent);
          store(summed + i, k == 0 ? term : load(summed + i, extent) + term, extent);
        });
      }
    }
    double sums[16] = {};
    if (call.bias_sums != nullptr && !call.bilinear && !sums_pixels<T>) {
      over_once<V>(width, [&](int64_t i, auto extent) { add_to_sums(sums, extent, load(summed + i, extent)); });
    } else if (call.bias_sums != nullptr) {
      for (int64_t k = 0; k < call.rows.own_count[s]; ++k) {
        const int64_t y = call.rows.own_begin[s] + k;
        const T* from = packed(grad + y * call.grad.stride_y, call.grad.stride_x, width, line);
        over_once<typename VectorOf<T>::type>(
            width, [&](int64_t i, auto extent) { add_to_sums(sums, extent, load(from + i, extent)); });
      }
    }
    if (call.bias_sums != nullptr) {
      double total = 0;
      for (const double sum : sums) total += sum;
      call.bias_sums[unit] = total;
    }
    if (call.columns.doubled && top_width >= V::width) {
      over<V>(top_width, [&](int64_t i, auto extent) {
        finish(out, upstream, i, gain * pair_sums(load(summed + 2 * i), load(summed + 2 * i + V::width)), extent);
      });
      continue;
    }
    over<V>(top_width, [&](int64_t i, auto extent) {
      V sum = broadcast<V>(0);
      for (int64_t k = 0; k < call.columns.longest; ++k) {
        const V value = gather<V>(summed, call.columns.index + k * top_width + i, extent);
        sum = sum + weighted(load(column_weights + k * top_width + i, extent), value);
      }
      finish(out, upstream, i, gain * sum, extent);
    });
  }
}

// Bilinear at ratio 2, away from the edges: weighted sums of 16 pixels, in the order of the loops in nhwc_rows.
template <class T, class V>
void four_by_four(
    const T* corner,
    int64_t stride_x,
    int64_t stride_y,
    const typename V::Scalar* row_weights,
    int64_t rows,
    const typename V::Scalar* column_weights,
    int64_t columns,
    int64_t channels,
    V gain,
    T* out,
    const T* upstream) {
  V down[4], along[4];
  for (int k = 0; k < 4; ++k) {
    down[k] = broadcast<V>(row_weights[k * rows]);
    along[k] = broadcast<V>(column_weights[k * columns]);
  }
  over_once<V>(channels, [&](int64_t i, auto extent) {
    V sum = broadcast<V>(0);
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      V column = broadcast<V>(0);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        column = column + down[k] * fetch<V>(corner + k * stride_y + l * stride_x + i, extent);
      }
      sum = sum + along[l] * column;
    }
    finish(out, upstream, i, gain * sum, extent);
  });
}

template <class T, class V>
void nhwc_rows(const UpsampleAddBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  using A = typename V::Scalar;
  const int64_t width = call.grad.width, channels = call.channels;
  T* line = reinterpret_cast<T*>(scratch);
  const V gain = broadcast<V>(static_cast<A>(call.gain));
  const A* row_weights = weights(call.rows, A());
  const A* column_weights = weights(call.columns, A());
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / call.top_height, s = unit % call.top_height;
    const T* grad = static_cast<const T*>(call.grad.data) + n * call.grad.stride_n;
    T* out = static_cast<T*>(call.grad_top.data) + n * call.grad_top.stride_n + s * call.grad_top.stride_y;
    const T* upstream = upstream_at<T>(call, out);
    double* sums = call.bias_sums == nullptr ? nullptr : call.bias_sums + unit * channels;
    const int64_t first = call.rows.begin[s], count = call.rows.count[s];
    int64_t stride_x = call.grad.stride_x, stride_y = call.grad.stride_y, offset_y = 0;
    if (call.grad.stride_c != 1) {
      // Copies the rows that read this coarse row to NHWC.  In the bilinear mode they include the rows that it owns.
      for (int64_t k = 0; k < count; ++k) {
        const T* from = grad + (first + k) * call.grad.stride_y;
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t x = 0; x < width; ++x) {
            line[(k * width + x) * channels + c] = from[c * call.grad.stride_c + x * call.grad.stride_x];
          }
        }
      }
      grad = line;
      stride_x = channels;
      stride_y = width * channels;
      offset_y = first;
    }
    if (sums != nullptr) {
      for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
    }
    const bool even = count == 2 && !call.bilinear && call.columns.doubled;
    const bool pixels_first = sums != nullptr && (call.bilinear || (sums_pixels<T> && !even));
    if (pixels_first) {
      for (int64_t k = 0; k < call.rows.own_count[s]; ++k) {
        const T* from = grad + (call.rows.own_begin[s] + k - offset_y) * stride_y;
        for (int64_t x = 0; x < width; ++x, from += stride_x) {
          over_once<typename VectorOf<T>::type>(
              channels, [&](int64_t i, auto extent) { add_to_sums(sums + i, extent, load(from + i, extent)); });
        }
      }
    }
    for (int64_t t = 0; t < call.top_width; ++t, out += channels, upstream += upstream == nullptr ? 0 : channels) {
      const int64_t left = call.columns.begin[t], columns = call.columns.count[t];
      const T* corner = grad + (first - offset_y) * stride_y + left * stride_x;
      if (even) {
        // The usual case without loops: twice as fast.
        const T* below = corner + stride_y;
        over_once<V>(channels, [&](int64_t i, auto extent) {
          const V north_west = fetch<V>(corner + i, extent), north_east = fetch<V>(corner + stride_x + i, extent);
          const V south_west = fetch<V>(below + i, extent), south_east = fetch<V>(below + stride_x + i, extent);
          const V sum = (north_west + south_west) + (north_east + south_east);
          finish(out, upstream, i, gain * sum, extent);
          if (sums == nullptr) return;
          if constexpr (sums_pixels<T> && std::is_same<V, Floats>::value) {
            add_to_sums(sums + i, extent, north_west, north_east, south_west, south_east);
          } else {
            add_to_sums(sums + i, extent, sum);
          }
        });
        continue;
      }
      if (count == 4 && columns == 4 && call.bilinear) {
        four_by_four<T, V>(
            corner, stride_x, stride_y, row_weights + s, call.top_height, column_weights + t, call.top_width, channels,
            gain, out, upstream);
        continue;
      }
      over_once<V>(channels, [&](int64_t i, auto extent) {
        V sum = broadcast<V>(0);
        for (int64_t l = 0; l < columns; ++l) {
          V column = broadcast<V>(0);
          for (int64_t k = 0; k < count; ++k) {
            const A weight = row_weights[k * call.top_height + s];
            const T* from = corner + k * stride_y + l * stride_x + i;
            column = column + weighted_or_plain<V>(from, weight, !call.bilinear, extent);
          }
          sum = call.bilinear ? sum + broadcast<V>(column_weights[l * call.top_width + t]) * column : sum + column;
        }
        finish(out, upstream, i, gain * sum, extent);
        if (sums != nullptr && !pixels_first) add_to_sums(sums + i, extent, sum);
      });
    }
  }
}

template <class T, class V>
void rows_with_sums(const UpsampleAddBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.channels_last ? nhwc_rows<T, V> : nchw_rows<T, V>)(call, begin, end, scratch);
}

template <class T>
void rows(const UpsampleAddBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  // A bilinear gradient is a longer sum; in float32 it was less exact than eager's.
  using Wide = typename std::conditional<std::is_same<T, float>::value, Doubles, typename VectorOf<T>::type>::type;
  if (call.bilinear) {
    rows_with_sums<T, Wide>(call, begin, end, scratch);
  } else {
    rows_with_sums<T, typename VectorOf<T>::type>(call, begin, end, scratch);
  }
}

}  // namespace

namespace fpn::cpu::FPN_ISA {

void upsample_add_backward_rows(const UpsampleAddBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element(call.dtype, [&](auto element) { rows<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
