// What a product in NCHW is added to.
#pragma once

#include "kernels.h"
#include "resize_line.h"
#include "vectors.h"

namespace {

using fpn::cpu::LateralConnection;
using fpn::cpu::line_bytes;

// bias + resized top for the pixels first .. first + count, a line of pixels for each channel.  `lines` has room for three lines of the width of either map.
template <class T>
void start_nchw(
    const LateralConnection& call,
    int64_t n,
    int64_t first,
    int64_t count,
    float* block,
    int64_t stride,
    std::byte* lines) {
  const int64_t line = line_bytes(call.width > call.top.width ? call.width : call.top.width, sizeof(float));
  float* expanded = reinterpret_cast<float*>(lines);
  float* expanded_next = reinterpret_cast<float*>(lines + line);
  float* wide = reinterpret_cast<float*>(lines + 2 * line);
  for (int64_t c = 0; c < call.cout; ++c, block += stride) {
    const Floats bias = broadcast<Floats>(call.bias[c]);
    {
      const T* out = static_cast<const T*>(call.out.data) + n * call.out.stride_n + c * call.out.stride_c + first;
      for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(out) + i, 1, 2);
      }
    }
    if (call.top.data == nullptr) {
      over<Floats>(count, [&](int64_t i, auto extent) { store(block + i, bias, extent); });
      continue;
    }
    const T* top = static_cast<const T*>(call.top.data) + n * call.top.stride_n + c * call.top.stride_c;
    int64_t held = -1;
    for (int64_t i = 0; i < count;) {
      const int64_t y = (first + i) / call.width, x = (first + i) % call.width;
      const int64_t length = call.width - x < count - i ? call.width - x : count - i;
      const int64_t lower = call.rows.lower[y];
      if (lower != held || x != 0) {
        resize_line<T, Floats>(call.columns, top + lower * call.top.stride_y, x, x + length, wide, expanded);
      }
      // Only a line that begins at 0 serves the row below it.
      held = x == 0 && length == call.width ? lower : -1;
      if (call.bilinear) {
        const int64_t upper = call.rows.upper[y];
        const Floats high = broadcast<Floats>(call.rows.weight[y]), low = broadcast<Floats>(1 - call.rows.weight[y]);
        resize_line<T, Floats>(call.columns, top + upper * call.top.stride_y, x, x + length, wide, expanded_next);
        over<Floats>(length, [&](int64_t j, auto extent) {
          const Floats resized = low * load(expanded + x + j, extent) + high * load(expanded_next + x + j, extent);
          store(block + i + j, bias + resized, extent);
        });
      } else {
        over<Floats>(length, [&](int64_t j, auto extent) {
          store(block + i + j, bias + load(expanded + x + j, extent), extent);
        });
      }
      i += length;
    }
  }
}

}  // namespace
