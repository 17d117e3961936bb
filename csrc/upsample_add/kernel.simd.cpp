#include "kernel.h"

#include "../simd/map_rows.h"
#include "../simd/vectors.h"

namespace {

using fpn::cpu::UpsampleAdd;
using fpn::cpu::line_bytes;

template <class T, bool streaming>
void nchw_rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  using A = typename V::Scalar;
  const int64_t width = call.lateral.width, height = call.lateral.height;
  ResizedRows<T, V> top(call.top, call.rows, call.columns, width, scratch);
  T* lateral_line = reinterpret_cast<T*>(scratch);
  const V gain = broadcast<V>(static_cast<A>(call.gain));
  int64_t plane = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % height, n = unit / height / call.channels, c = unit / height % call.channels;
    if (unit / height != plane) {
      plane = unit / height;
      top.enter(n, c);
    }
    const T* lateral = row<T>(call.lateral, n, y) + c * call.lateral.stride_c;
    lateral = packed(lateral, call.lateral.stride_x, width, lateral_line);
    T* out = row<T>(call.out, n, y) + c * call.out.stride_c;
    top.hold(y);
    const A *lower = top.lower(), *upper = top.upper();
    if (!call.bilinear) {
      over<V>(width, [&](int64_t i, auto extent) {
        put<streaming>(out + i, gain * (load(lateral + i, extent) + load(lower + i, extent)), extent);
      });
      continue;
    }
    const A weight = weights(call.rows, A())[y];
    const V high = broadcast<V>(weight), low = broadcast<V>(1 - weight);
    over<V>(width, [&](int64_t i, auto extent) {
      const V resized = low * load(lower + i, extent) + high * load(upper + i, extent);
      put<streaming>(out + i, gain * (load(lateral + i, extent) + resized), extent);
    });
  }
}

template <class T, bool streaming>
void nhwc_rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  using A = typename V::Scalar;
  const int64_t width = call.lateral.width, height = call.lateral.height, channels = call.channels;
  T* lateral_line = reinterpret_cast<T*>(scratch);
  if (call.lateral.stride_c != 1) scratch += line_bytes(width * channels, sizeof(T));
  T* lower_line = reinterpret_cast<T*>(scratch);
  T* upper_line = reinterpret_cast<T*>(scratch + line_bytes(call.top.width * channels, sizeof(T)));
  const V gain = broadcast<V>(static_cast<A>(call.gain));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / height, y = unit % height;
    int64_t lateral_stride, top_stride;
    const T* lateral = packed_row(call.lateral, n, y, channels, lateral_stride, lateral_line);
    const T* top = packed_row(call.top, n, call.rows.lower[y], channels, top_stride, lower_line);
    T* out = row<T>(call.out, n, y);
    if (!call.bilinear) {
      for (int64_t x = 0; x < width; ++x, lateral += lateral_stride, out += channels) {
        const T* from = top + call.columns.lower[x] * top_stride;
        over<V>(channels, [&](int64_t i, auto extent) {
          put<streaming>(out + i, gain * (load(lateral + i, extent) + load(from + i, extent)), extent);
        });
      }
      continue;
    }
    const T* top_next = packed_row(call.top, n, call.rows.upper[y], channels, top_stride, upper_line);
    const A row_weight = weights(call.rows, A())[y];
    const V high = broadcast<V>(row_weight), low = broadcast<V>(1 - row_weight);
    for (int64_t x = 0; x < width; ++x, lateral += lateral_stride, out += channels) {
      const int64_t left = call.columns.lower[x] * top_stride, right = call.columns.upper[x] * top_stride;
      const A column_weight = weights(call.columns, A())[x];
      const V rightwards = broadcast<V>(column_weight), leftwards = broadcast<V>(1 - column_weight);
      over<V>(channels, [&](int64_t i, auto extent) {
        const V above = leftwards * load(top + left + i, extent) + rightwards * load(top + right + i, extent);
        const V below = leftwards * load(top_next + left + i, extent) + rightwards * load(top_next + right + i, extent);
        put<streaming>(out + i, gain * (load(lateral + i, extent) + (low * above + high * below)), extent);
      });
    }
  }
}

template <class T, bool streaming>
void rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.channels_last ? nhwc_rows<T, streaming> : nchw_rows<T, streaming>)(call, begin, end, scratch);
  if (streaming) end_of_stream();
}

template <class T>
void rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.streaming ? rows<T, true> : rows<T, false>)(call, begin, end, scratch);
}

}  // namespace

namespace fpn::cpu::FPN_ISA {

void upsample_add_rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element(call.dtype, [&](auto element) { rows<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
