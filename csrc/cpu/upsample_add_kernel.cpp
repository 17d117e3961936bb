// out = gain * (lateral + resize(top)), row by row.  Compiled once a level (FPN_LEVEL).

#include "kernels.h"
#include "resize_line.h"
#include "vectors.h"

namespace {

using fpn::cpu::Map;
using fpn::cpu::UpsampleAdd;
using fpn::cpu::line_bytes;

template <class T>
const T* row(const Map& map, int64_t n, int64_t y) {
  return static_cast<const T*>(map.data) + n * map.stride_n + y * map.stride_y;
}

// `count` elements that lie `stride` apart: where they are, or side by side in `line`.
template <class T>
const T* packed(const T* from, int64_t stride, int64_t count, T* line) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < count; ++i) line[i] = from[i * stride];
  return line;
}

// A whole row of pixels with their channels side by side.
template <class T>
const T* packed_row(const Map& map, int64_t n, int64_t y, int64_t channels, int64_t& stride_x, T* line) {
  const T* from = row<T>(map, n, y);
  stride_x = map.stride_x;
  if (map.stride_c == 1) return from;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < map.width; ++x) line[x * channels + c] = from[c * map.stride_c + x * map.stride_x];
  }
  stride_x = channels;
  return line;
}

template <bool streaming, class T, class V, class Extent>
inline void put(T* to, V value, Extent extent) {
  if constexpr (streaming) {
    static_cast<void>(extent);
    stream(to, value);
  } else {
    store(to, value, extent);
  }
}

template <class T, class A, class V>
void expand(const UpsampleAdd& call, const T* from, T* staged, A* wide, A* to) {
  const T* line = packed(from, call.top.stride_x, call.top.width, staged);
  resize_line<T, V>(call.columns, line, 0, call.lateral.width, wide, to);
}

template <class T, bool streaming>
void nchw_rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  using A = typename V::Scalar;
  const int64_t width = call.lateral.width, height = call.lateral.height;
  A* expanded = reinterpret_cast<A*>(scratch);
  A* expanded_next = reinterpret_cast<A*>(scratch += line_bytes(width, sizeof(A)));
  A* wide = reinterpret_cast<A*>(scratch += line_bytes(width, sizeof(A)));
  T* top_line = reinterpret_cast<T*>(scratch += line_bytes(call.top.width, sizeof(A)));
  T* lateral_line = reinterpret_cast<T*>(scratch += line_bytes(call.top.width, sizeof(A)));
  const V gain = broadcast<V>(static_cast<A>(call.gain));
  int64_t plane = -1, lower_held = -1, upper_held = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % height;
    if (unit / height != plane) {
      plane = unit / height;
      lower_held = upper_held = -1;
    }
    const int64_t n = plane / call.channels, c = plane % call.channels;
    const T* lateral = row<T>(call.lateral, n, y) + c * call.lateral.stride_c;
    lateral = packed(lateral, call.lateral.stride_x, width, lateral_line);
    T* out = static_cast<T*>(call.out.data) + n * call.out.stride_n + c * call.out.stride_c + y * call.out.stride_y;
    const auto top_row = [&](int64_t index) { return row<T>(call.top, n, index) + c * call.top.stride_c; };
    const int64_t lower = call.rows.lower[y];
    if (call.bilinear && lower == upper_held) {
      A* was = expanded;
      expanded = expanded_next;
      expanded_next = was;
      upper_held = lower_held;
      lower_held = lower;
    }
    if (lower != lower_held) {
      expand<T, A, V>(call, top_row(lower), top_line, wide, expanded);
      lower_held = lower;
    }
    if (!call.bilinear) {
      over<V>(width, [&](int64_t i, auto extent) {
        put<streaming>(out + i, gain * (load(lateral + i, extent) + load(expanded + i, extent)), extent);
      });
      continue;
    }
    const int64_t upper = call.rows.upper[y];
    if (upper != upper_held) {
      expand<T, A, V>(call, top_row(upper), top_line, wide, expanded_next);
      upper_held = upper;
    }
    const A weight = weights(call.rows, A())[y];
    const V high = broadcast<V>(weight), low = broadcast<V>(1 - weight);
    over<V>(width, [&](int64_t i, auto extent) {
      const V resized = low * load(expanded + i, extent) + high * load(expanded_next + i, extent);
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
    T* out = static_cast<T*>(call.out.data) + n * call.out.stride_n + y * call.out.stride_y;
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

namespace fpn::cpu::FPN_LEVEL {

void upsample_add_rows(const UpsampleAdd& call, int64_t begin, int64_t end, std::byte* scratch) {
  switch (call.dtype) {
    case Dtype::float16: return rows<Half>(call, begin, end, scratch);
    case Dtype::bfloat16: return rows<BFloat16>(call, begin, end, scratch);
    case Dtype::float32: return rows<float>(call, begin, end, scratch);
    case Dtype::float64: return rows<double>(call, begin, end, scratch);
  }
}

}  // namespace fpn::cpu::FPN_LEVEL
