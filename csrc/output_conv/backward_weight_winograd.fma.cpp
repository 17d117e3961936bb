// The gradient of the 3x3 weight, of float32 and 16-bit maps in NHWC, per part of the output and input channels.
//
// It follows from the identity in winograd_tiles.h.  For the 2x2 gradients dY of a tile's results,
//     dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G.
// For each of the 16 elements the sum over the tiles is a matrix product, [cout, tiles] x [tiles, cin].  A part's sums
// stay in L2 over all tiles.  Each part transforms its own operands, so transforms are repeated between parts.

#include "backward_weight_winograd.h"

#include <algorithm>
#include <cstring>

#include "winograd_input.h"
#include "winograd_products.h"
#include "winograd_tiles.h"

namespace {

using fpn::cpu::OutputConvBackwardWeight;

// The output or the input channels of a part.
struct Channels {
  int64_t first, count;
};

// A of two vectors: the two rows, or columns, of a tile.
inline void gradient_line(Floats y0, Floats y1, Floats (&to)[4]) {
  to[0] = y0;
  to[1] = y0 + y1;
  to[2] = y0 - y1;
  to[3] = broadcast<Floats>(0.0f) - y1;
}

inline void add_wide(double* to, Floats value) {
  store(to, load(to) + low_half(value));
  store(to + 8, load(to + 8) + high_half(value));
}

// A dY A^T of a block of tiles: element e of tile t and channel c at to[e * plane + t * stride + c].  Adds the
// gradients to `bias` unless it is null.  `padding` is a pixel of zeros.
template <class T>
void gradient_tiles(
    const OutputConvBackwardWeight& call,
    int64_t first,
    int64_t count,
    Channels channels,
    float* to,
    double* bias,
    const T* padding) {
  const Map& map = call.grad;
  const int64_t plane = call.grad_plane, stride = call.part_out;
  over_runs(call.conv, first, count, [&](const Run& run) {
    const T* data = static_cast<const T*>(map.data) + run.n * map.stride_n + channels.first;
    for (int64_t t = 0; t < run.count; ++t) {
      const T* pixels[2][2];
      for (int i = 0; i < 2; ++i) {
        const int64_t y = 2 * run.row + i;
        for (int j = 0; j < 2; ++j) {
          const int64_t x = 2 * (run.column + t) + j;
          const bool inside = y < map.height && x < map.width;
          pixels[i][j] = inside ? data + y * map.stride_y + x * map.stride_x : padding;
        }
      }
      float* tile = to + (run.at + t) * stride;
      const auto step = [&](int64_t c, auto read) {
        Floats lines[4][2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          for (int i = 0; i < 2; ++i) __builtin_prefetch(pixels[i][j] + tiles_ahead * map.stride_x + c, 0, 3);
          const Floats above = read(pixels[0][j] + c), below = read(pixels[1][j] + c);
          if (bias != nullptr) {
            add_wide(bias + c, above);
            add_wide(bias + c, below);
          }
          Floats column[4];
          gradient_line(above, below, column);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) lines[i][j] = column[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          Floats row[4];
          gradient_line(lines[i][0], lines[i][1], row);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) store(tile + (4 * i + j) * plane + c, row[j]);
        }
      };
      int64_t c = 0;
      for (; c + 16 <= channels.count; c += 16) step(c, [](const T* from) { return load(from); });
      if (c < channels.count) {
        const Elements tail = first_elements(channels.count - c);
        step(c, [&](const T* from) { return load_masked(from, tail); });
      }
    }
  });
}

// G^T of four vectors.
inline void weight_gradient_line(Floats s0, Floats s1, Floats s2, Floats s3, Floats (&to)[3]) {
  const Floats half = broadcast<Floats>(0.5f), ends = half * (s1 + s2);
  to[0] = s0 + ends;
  to[1] = half * (s1 - s2);
  to[2] = ends + s3;
}

// Writes G^T S G of a part's sums S to the weight's gradient.  Returns whether all values are finite.
template <class T>
bool write_weights(const OutputConvBackwardWeight& call, const float* sums, Channels outs, Channels ins) {
  const int64_t plane = call.part_out * panel_columns;
  bool finite = true;
  for (int64_t in = 0; in < ins.count; in += 16) {
    const float* panel = sums + in / panel_columns * elements * plane + in % panel_columns;
    const int64_t columns = std::min<int64_t>(16, ins.count - in);
    for (int64_t out = 0; out < outs.count; ++out) {
      const float* from = panel + out * panel_columns;
      Floats lines[3][4];
      for (int j = 0; j < 4; ++j) {
        Floats column[3];
        const float* at = from + j * plane;
        weight_gradient_line(load(at), load(at + 4 * plane), load(at + 8 * plane), load(at + 12 * plane), column);
        for (int i = 0; i < 3; ++i) lines[i][j] = column[i];
      }
      T taps[9][16];
      for (int i = 0; i < 3; ++i) {
        Floats row[3];
        weight_gradient_line(lines[i][0], lines[i][1], lines[i][2], lines[i][3], row);
        for (int j = 0; j < 3; ++j) {
          finite &= all_finite(row[j]);
          store(taps[3 * i + j], row[j]);
        }
      }
      T* to = static_cast<T*>(call.out.data) + (outs.first + out) * call.out.stride_n +
          (ins.first + in) * call.out.stride_c;
      for (int64_t c = 0; c < columns; ++c, to += call.out.stride_c) {
        for (int tap = 0; tap < 9; ++tap) to[tap / 3 * call.out.stride_y + tap % 3 * call.out.stride_x] = taps[tap][c];
      }
    }
  }
  return finite;
}

template <class T>
bool part(const OutputConvBackwardWeight& call, Channels outs, Channels ins, bool with_bias, std::byte* scratch) {
  float* grads = reinterpret_cast<float*>(scratch);
  float* input = reinterpret_cast<float*>(scratch + call.input_at);
  float* sums = reinterpret_cast<float*>(scratch + call.sums_at);
  double* bias = reinterpret_cast<double*>(scratch + call.bias_at);
  const T* padding = reinterpret_cast<const T*>(scratch + call.zeros_at);
  // Padding channels are multiplied as well and must be finite.
  std::memset(scratch, 0, static_cast<size_t>(call.scratch_bytes));
  const int64_t sums_plane = call.part_out * panel_columns;
  for (int64_t first = 0; first < call.conv.tiles; first += call.block) {
    const int64_t count = std::min(call.block, call.conv.tiles - first);
    gradient_tiles<T>(call, first, count, outs, grads, with_bias ? bias : nullptr, padding);
    for (int64_t in = 0, panel = 0; in < ins.count; in += panel_columns, ++panel) {
      fpn::cpu::OutputConv conv = call.conv;
      conv.feature.data = static_cast<const T*>(conv.feature.data) + ins.first + in;
      conv.cin = std::min(panel_columns, ins.count - in);
      input_channels_last<T>(conv, first, count, {input, call.input_plane, panel_columns, 1}, padding);
      for (int e = 0; e < elements; ++e) {
        const float* left = grads + e * call.grad_plane;
        const float* right = input + e * call.input_plane;
        float* to = sums + (panel * elements + e) * sums_plane;
        for (int64_t out = 0; out < outs.count; out += register_rows) {
          const int64_t rows = std::min<int64_t>(register_rows, outs.count - out);
          for (int64_t column = 0; column < panel_columns; column += register_columns) {
            float* at = to + out * panel_columns + column;
            add_rows<false>(rows, left + out, call.part_out, right + column, count, false, at);
          }
        }
      }
    }
  }
  if (with_bias) std::memcpy(call.bias_sums + outs.first, bias, static_cast<size_t>(outs.count) * sizeof(double));
  return write_weights<T>(call, sums, outs, ins);
}

template <class T>
void parts(const OutputConvBackwardWeight& call, int64_t begin, int64_t end, std::byte* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t out = unit % call.parts_out * call.part_out, in = unit / call.parts_out * call.part_in;
    const Channels outs{out, std::min(call.part_out, call.conv.cout - out)};
    const Channels ins{in, std::min(call.part_in, call.conv.cin - in)};
    call.finite[unit] = part<T>(call, outs, ins, call.bias_sums != nullptr && in == 0, scratch) ? 1 : 0;
  }
}

}  // namespace

namespace fpn::cpu::FPN_ISA {

void output_conv_backward_weight_parts(
    const OutputConvBackwardWeight& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element_of_floats(call.conv.dtype, [&](auto element) { parts<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
