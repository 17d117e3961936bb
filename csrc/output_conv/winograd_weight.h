// The weight transform G g G^T, into panels of output channels in the order of the products.
#pragma once

#include "../simd/transposes.h"
#include "winograd_tiles.h"

namespace {

constexpr int64_t taps = 9;

template <class T>
float weight_at(const OutputConv& call, int64_t row, int64_t channel, int64_t tap) {
  const int64_t* strides = call.weight_strides;
  const int64_t at = row * strides[0] + channel * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3];
  return single(static_cast<const T*>(call.weight_from)[at]);
}

// [tap][16 output channels from `row`], padded with zeros.
template <class T>
void gather_taps(const OutputConv& call, int64_t row, int64_t channel, float* to) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t i = 0; i < 16; ++i, ++to) *to = row + i < call.cout ? weight_at<T>(call, row + i, channel, tap) : 0.0f;
  }
}

// Transposes sixteen contiguous weights of each of sixteen output channels to lines of output channels.
template <class T>
void transpose_weights(const T* from, int64_t row_stride, float* to, int64_t stride) {
  Floats rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = load(from + i * row_stride);
  transpose(rows);
  for (int i = 0; i < 16; ++i) store(to + i * stride, rows[i]);
}

// The taps of up to sixteen input channels from `channel`: to[channel][tap][output channel].
template <class T>
void gather_weights(const OutputConv& call, int64_t row, int64_t channel, float* to) {
  const int64_t* strides = call.weight_strides;
  const T* from = static_cast<const T*>(call.weight_from) + row * strides[0] + channel * strides[1];
  const bool whole = row + 16 <= call.cout && channel + 16 <= call.cin;
  if (whole && strides[3] == 1 && strides[2] == 3 && strides[1] == taps) {
    for (int64_t i = 0; i < taps; ++i) transpose_weights(from + 16 * i, strides[0], to + 256 * i, 16);
  } else if (whole && strides[1] == 1) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      transpose_weights(from + tap / 3 * strides[2] + tap % 3 * strides[3], strides[0], to + 16 * tap, 16 * taps);
    }
  } else {
    for (int64_t c = channel; c < call.cin && c < channel + 16; ++c, to += 16 * taps) {
      gather_taps<T>(call, row, c, to);
    }
  }
}

// G of three vectors.
inline void weight_line(Floats g0, Floats g1, Floats g2, Floats (&to)[4]) {
  const Floats half = broadcast<Floats>(0.5f);
  const Floats ends = g0 + g2;
  to[0] = g0;
  to[1] = half * (ends + g1);
  to[2] = half * (ends - g1);
  to[3] = g2;
}

// Transforms nine lines of output channels to sixteen, `plane` apart.
inline void transform_weight(const float* from, float* to, int64_t plane) {
  Floats lines[4][3];
  for (int j = 0; j < 3; ++j) {
    Floats column[4];
    const float* tap = from + 16 * j;
    weight_line(load(tap), load(tap + 48), load(tap + 96), column);
    for (int i = 0; i < 4; ++i) lines[i][j] = column[i];
  }
  for (int i = 0; i < 4; ++i) {
    Floats row[4];
    weight_line(lines[i][0], lines[i][1], lines[i][2], row);
    for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * plane, row[j]);
  }
}

// A unit is sixteen input channels of a panel of output channels.
template <class T>
void transform_weights(const OutputConv& call, int64_t begin, int64_t end) {
  const int64_t groups = (call.cin + 15) / 16;
  alignas(64) float raw[16 * taps * 16];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t panel = unit / groups, first = unit % groups * 16;
    const int64_t channels = call.cin - first < 16 ? call.cin - first : 16;
    for (int64_t half = 0; half < panel_columns; half += 16) {
      const int64_t row = panel * panel_columns + half;
      float* to = call.weight + panel * elements * call.cin * panel_columns + first * panel_columns + half;
      gather_weights<T>(call, row, first, raw);
      for (int64_t c = 0; c < channels; ++c) {
        transform_weight(raw + c * 16 * taps, to + c * panel_columns, call.cin * panel_columns);
      }
      if (first != 0) continue;
      for (int64_t i = row; i < row + 16; ++i) {
        const bool exists = call.bias_from != nullptr && i < call.cout;
        call.bias[i] = exists ? single(static_cast<const T*>(call.bias_from)[i * call.bias_stride]) : 0.0f;
      }
    }
  }
}

}  // namespace
