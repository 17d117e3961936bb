// The plain sum over 3x3 pixels, for tiles where a result is infinite or NaN.  There the transforms may differ from it:
// the difference of two infinite pixels is NaN, that of two large ones may overflow.
//
// A map of nothing but NaN takes about three times as long as by PyTorch's own; finite maps never come here.
#pragma once

#include "output_conv_block.h"
#include "output_conv_weight.h"

namespace {

struct Pixel {
  int64_t n, y, x;
};
static_assert(sizeof(Pixel) <= fpn::cpu::list_entry);

// The results of the tiles that failed; how many there are.
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

// Computes them again.  `sums` has room for sixteen floats a pixel, `list` for every pixel.
template <class T>
void recompute(
    const OutputConv& call, int64_t first, int64_t count, const unsigned char* failed, float* sums, Pixel* list) {
  const Map& map = call.feature;
  const int64_t number = list_failed(call, first, count, failed, list);
  for (int64_t row = 0; row < call.cout; row += 16) {
    const __m512 bias = _mm512_loadu_ps(call.bias + row);
    for (int64_t p = 0; p < number; ++p) _mm512_storeu_ps(sums + 16 * p, _mm512_setzero_ps());
    for (int64_t c = 0; c < call.cin; ++c) {
      alignas(64) float weights[16 * taps];
      gather_taps<T>(call, row, c, weights);
      for (int64_t p = 0; p < number; ++p) {
        const Pixel& at = list[p];
        const T* centre = static_cast<const T*>(map.data) + at.n * map.stride_n + c * map.stride_c +
            at.y * map.stride_y + at.x * map.stride_x;
        __m512 sum = _mm512_loadu_ps(sums + 16 * p);
        for (int i = -1; i <= 1; ++i) {
          for (int j = -1; j <= 1; ++j) {
            if (at.y + i < 0 || at.y + i >= map.height || at.x + j < 0 || at.x + j >= map.width) continue;
            const __m512 pixel = _mm512_set1_ps(single(centre[i * map.stride_y + j * map.stride_x]));
            sum = _mm512_fmadd_ps(pixel, _mm512_load_ps(weights + 16 * (3 * (i + 1) + j + 1)), sum);
          }
        }
        _mm512_storeu_ps(sums + 16 * p, sum);
      }
    }
    for (int64_t p = 0; p < number; ++p) {
      T* to = static_cast<T*>(call.out.data) + list[p].n * call.out.stride_n + row * call.out.stride_c +
          list[p].y * call.out.stride_y + list[p].x * call.out.stride_x;
      T rounded[16];
      store(rounded, Floats{_mm512_add_ps(_mm512_loadu_ps(sums + 16 * p), bias)});
      for (int64_t i = 0; i < 16 && row + i < call.cout; ++i) to[i * call.out.stride_c] = rounded[i];
    }
  }
}

}  // namespace
