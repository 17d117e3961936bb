// Recomputes tiles with an infinite or NaN result by the direct sum over 3x3 pixels.  The transforms may differ from
// it: the difference of two infinite pixels is NaN, and that of two large pixels may overflow.
//
// A map of NaN takes four times as long as in PyTorch (Zen 4); finite maps are not affected.
#pragma once

#include "winograd_tiles.h"
#include "winograd_weight.h"

namespace {

struct Pixel {
  int64_t n, y, x;
};
static_assert(sizeof(Pixel) <= fpn::cpu::list_entry);

// Lists the results of the tiles that failed and returns their number.
inline int64_t list_failed(
    const OutputConv& call, int64_t first, int64_t count, const unsigned char* failed, Pixel* list) {
  int64_t number = 0;
  over_runs(call, first, count, [&](const Run& run) {
    for (int64_t t = 0; t < run.count; ++t) {
      if (failed[run.at + t] == 0) continue;
      const int64_t top = 2 * run.row, left = 2 * (run.column + t);
      for (int64_t y = top; y < top + 2 && y < call.feature.height; ++y) {
        for (int64_t x = left; x < left + 2 && x < call.feature.width; ++x) list[number++] = {run.n, y, x};
      }
    }
  });
  return number;
}

// Recomputes in float64, so that a result is infinite only if the sum exceeds float32, not if a term or a partial sum
// does.  The padding is multiplied by the weight as zeros (NaN for an infinite weight), like in oneDNN.  sums: sixteen
// doubles per pixel; list: a buffer for all pixels.
template <class T>
void recompute(
    const OutputConv& call, int64_t first, int64_t count, const unsigned char* failed, double* sums, Pixel* list) {
  const Map& map = call.feature;
  const int64_t number = list_failed(call, first, count, failed, list);
  for (int64_t row = 0; row < call.cout; row += 16) {
    for (int64_t i = 0; i < 16 * number; ++i) sums[i] = 0;
    for (int64_t c = 0; c < call.cin; ++c) {
      alignas(64) float weights[taps][16];
      gather_taps<T>(call, row, c, weights[0]);
      Doubles wide[taps][2];
      for (int64_t tap = 0; tap < taps; ++tap) {
        wide[tap][0] = load_wide(weights[tap]);
        wide[tap][1] = load_wide(weights[tap] + 8);
      }
      const T* channel = static_cast<const T*>(map.data) + c * map.stride_c;
      for (int64_t p = 0; p < number; ++p) {
        const T* image = channel + list[p].n * map.stride_n;
        Doubles low = load(sums + 16 * p), high = load(sums + 16 * p + 8);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t y = list[p].y + tap / 3 - 1, x = list[p].x + tap % 3 - 1;
          const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
          const float pixel = inside ? single(image[y * map.stride_y + x * map.stride_x]) : 0.0f;
          const Doubles value = broadcast<Doubles>(pixel);
          low = fused(low, value, wide[tap][0]);
          high = fused(high, value, wide[tap][1]);
        }
        store(sums + 16 * p, low);
        store(sums + 16 * p + 8, high);
      }
    }
    for (int64_t p = 0; p < number; ++p) {
      T* to = static_cast<T*>(call.out.data) + list[p].n * call.out.stride_n + row * call.out.stride_c +
          list[p].y * call.out.stride_y + list[p].x * call.out.stride_x;
      float results[16];
      for (int i = 0; i < 16; i += 8) {
        store(results + i, load(sums + 16 * p + i) + load_wide(call.bias + row + i));
      }
      T rounded[16];
      store(rounded, load(results));
      for (int64_t i = 0; i < 16 && row + i < call.cout; ++i) to[i * call.out.stride_c] = rounded[i];
    }
  }
}

}  // namespace
