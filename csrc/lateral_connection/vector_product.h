// The 1x1 convolution, its bias and the merge as one matrix product over blocks of pixels, summed in float32.
//
// The including file defines `Operand` (a float, or a pair of bfloat16 channels) and its product.  Per block of pixels,
// a buffer in the cache is filled with bias + resized top.  The product is added in chunks of channels; the last
// addition also scales, rounds (once) and writes the result.
//
// A tile of accumulators stays in registers: 12 x 32 on AVX-512, 6 x 16 on AVX2.  The left operand is broadcast element
// by element, the right operand is loaded as vectors from panels of 32 columns:
//   result NHWC: rows are pixels, columns output channels; left = feature, right = weight
//   result NCHW: rows are output channels, columns pixels; left = weight, right = feature

#include "../simd/resize_line.h"

namespace {

using fpn::cpu::line_bytes;

constexpr int64_t panel_columns = fpn::cpu::panel_columns;
constexpr int tile_columns = 16 * row_vectors;
constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Sink {
  float* block;        // partial sums of this tile
  int64_t block_stride;
  bool last;           // the last chunk: write the result
  std::byte* out;      // of the tile's first element
  int64_t out_stride;  // elements from row to row
  int columns;         // existing columns of the tile
  Floats gain;
};

// Writes a tile that ends within a panel.  Not inlined into each tile: GCC 12 would compile for 35 s instead of 9.
template <class T>
__attribute__((noinline)) void write_narrow(int rows, const Sink& sink) {
  for (int i = 0; i < rows; ++i) {
    T* line = reinterpret_cast<T*>(sink.out) + i * sink.out_stride;
    for (int first = 0; first < sink.columns; first += Floats::width) {
      const Floats value = load(sink.block + i * sink.block_stride + first) * sink.gain;
      if (sink.columns - first >= Floats::width) {
        write_whole(line + first, value);
      } else {
        write_part(line + first, value, sink.columns - first);
      }
    }
  }
}

template <class T, int rows, bool unit_k>
void tile(Left left, const Operand* panel, int64_t count, const Sink& sink) {
  Floats sums[rows][row_vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) sums[i][j] = broadcast<Floats>(0.0f);
  }
  // Four rows share an address register: x86 has too few for one each.
  const Operand* quads[(rows + 3) / 4];
#pragma GCC unroll 16
  for (int q = 0; q < (rows + 3) / 4; ++q) {
    quads[q] = left.data + 4 * q * left.row_stride;
    asm("" : "+r"(quads[q]));
  }
  const int64_t stride = left.row_stride;
  for (int64_t k = 0; k < count; ++k) {
    Floats right[row_vectors];
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) right[j] = load(reinterpret_cast<const float*>(panel + 16 * j));
    panel += panel_columns;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Floats value = spread(quads[i / 4] + (i % 4) * stride);
#pragma GCC unroll 2
      for (int j = 0; j < row_vectors; ++j) sums[i][j] = multiply_add(sums[i][j], value, right[j]);
    }
#pragma GCC unroll 16
    for (int q = 0; q < (rows + 3) / 4; ++q) quads[q] += unit_k ? 1 : left.k_stride;
  }
  float* const block = sink.block;
  const int64_t block_stride = sink.block_stride;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) sums[i][j] = load(block + i * block_stride + 16 * j) + sums[i][j];
  }
  const bool narrow = sink.columns < tile_columns;
  if (!sink.last || narrow) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < row_vectors; ++j) store(block + i * block_stride + 16 * j, sums[i][j]);
    }
    if (sink.last) write_narrow<T>(rows, sink);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    T* line = reinterpret_cast<T*>(sink.out) + i * sink.out_stride;
#pragma GCC unroll 2
    for (int j = 0; j < row_vectors; ++j) write_whole(line + 16 * j, sums[i][j] * sink.gain);
  }
}

template <class T, bool unit_k, int height = max_rows>
void tile_of(int64_t rows, Left left, const Operand* panel, int64_t count, const Sink& sink) {
  if constexpr (height > 1) {
    if (rows < height) return tile_of<T, unit_k, height - 1>(rows, left, panel, count, sink);
  }
  tile<T, height, unit_k>(left, panel, count, sink);
}

// One chunk of the product of a block.  Panels are `panel_stride` operands apart.
template <class T>
void multiply_block(
    Left left, const Operand* panels, int64_t panel_stride, int64_t rows, int64_t columns, int64_t count, Sink sink) {
  float* const block = sink.block;
  std::byte* const out = sink.out;
  for (int64_t column = 0; column < columns; column += panel_columns, panels += panel_stride) {
    const int64_t end = columns - column < panel_columns ? columns - column : panel_columns;
    for (int64_t row = 0; row < rows; row += max_rows) {
      const int64_t height = rows - row < max_rows ? rows - row : max_rows;
      const Left at{left.data + row * left.row_stride, left.row_stride, left.k_stride};
      for (int64_t part = 0; part < end; part += tile_columns) {
        sink.block = block + row * sink.block_stride + column + part;
        sink.out = out + (row * sink.out_stride + column + part) * static_cast<int64_t>(sizeof(T));
        sink.columns = static_cast<int>(end - part < tile_columns ? end - part : tile_columns);
        if (left.k_stride == 1) {
          tile_of<T, true>(height, at, panels + part, count, sink);
        } else {
          tile_of<T, false>(height, at, panels + part, count, sink);
        }
      }
    }
  }
}

// Fills a block with bias + resized top, [pixel][channel], for pixels first .. first + count.
template <class T>
void start_nhwc(const LateralConnection& call, int64_t n, int64_t first, int64_t count, float* block, int64_t stride) {
  const int64_t pixel_bytes = call.feature_channels_last ? call.cin * static_cast<int64_t>(sizeof(T)) : 0;
  for (int64_t i = 0; i < count; ++i, block += stride) {
    const int64_t y = (first + i) / call.width, x = (first + i) % call.width;
    // The tiles read a dozen pixels at once, more streams than the hardware prefetches: 9 % at a float32 C2.
    const char* feature = reinterpret_cast<const char*>(pixel<T>(call, n, first + i));
    for (int64_t byte = 0; byte < pixel_bytes; byte += 64) __builtin_prefetch(feature + byte, 0, 2);
    if (call.top.data == nullptr) {
      over<Floats>(call.cout, [&](int64_t c, auto extent) { store(block + c, load(call.bias + c, extent), extent); });
      continue;
    }
    const T* top = static_cast<const T*>(call.top.data) + n * call.top.stride_n;
    const T* row = top + call.rows.lower[y] * call.top.stride_y;
    const int64_t left = call.columns.lower[x] * call.top.stride_x;
    if (!call.bilinear) {
      over<Floats>(call.cout, [&](int64_t c, auto extent) {
        store(block + c, load(call.bias + c, extent) + load(row + left + c, extent), extent);
      });
      continue;
    }
    const T* next = top + call.rows.upper[y] * call.top.stride_y;
    const int64_t right = call.columns.upper[x] * call.top.stride_x;
    const Floats high = broadcast<Floats>(call.rows.weight[y]), low = broadcast<Floats>(1 - call.rows.weight[y]);
    const Floats east = broadcast<Floats>(call.columns.weight[x]);
    const Floats west = broadcast<Floats>(1 - call.columns.weight[x]);
    over<Floats>(call.cout, [&](int64_t c, auto extent) {
      const Floats above = west * load(row + left + c, extent) + east * load(row + right + c, extent);
      const Floats below = west * load(next + left + c, extent) + east * load(next + right + c, extent);
      store(block + c, load(call.bias + c, extent) + (low * above + high * below), extent);
    });
  }
}

// The same, [channel][pixel].  `lines` is a buffer for three rows of the wider map.
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
      // Only a complete row can be reused for the next row.
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

// A block whose result is NHWC.
template <class T>
void nhwc_block(const LateralConnection& call, int64_t n, int64_t first, int64_t count, std::byte* scratch) {
  const int64_t operands = call.operands;
  float* block = reinterpret_cast<float*>(scratch);
  const int64_t stride = round_up(call.cout, panel_columns);
  Operand* packed = reinterpret_cast<Operand*>(scratch + line_bytes(count * stride, sizeof(float)));
  start_nhwc<T>(call, n, first, count, block, stride);
  for (int64_t k = 0; k < operands; k += chunk) {
    const int64_t length = operands - k < chunk ? operands - k : chunk;
    Left left{};
    if (call.feature_channels_last) {
      left = left_nhwc<T>(call, n, first, count, k, length, packed);
    } else {
      // [operand][pixel]
      const int64_t pixels = round_up(count, panel_columns);
      pack_pixels<T>(call, n, first, count, k, length, packed, pixels, pixels * chunk);
      left = {packed, 1, pixels};
    }
    const Sink sink{
        block,
        stride,
        k + length == operands,
        static_cast<std::byte*>(call.out.data) +
            (n * call.out.stride_n + first * call.out.stride_x) * static_cast<int64_t>(sizeof(T)),
        call.out.stride_x,
        0,
        broadcast<Floats>(static_cast<float>(call.gain))};
    const Operand* weight = static_cast<const Operand*>(call.weight) + k * panel_columns;
    multiply_block<T>(left, weight, call.weight_line, count, call.cout, length, sink);
  }
}

// A block whose result and feature are NCHW.
template <class T>
void nchw_block(const LateralConnection& call, int64_t n, int64_t first, int64_t count, std::byte* scratch) {
  const int64_t operands = call.operands;
  const int64_t stride = round_up(count, panel_columns);
  float* block = reinterpret_cast<float*>(scratch);
  Operand* packed = reinterpret_cast<Operand*>(scratch + line_bytes(call.cout * stride, sizeof(float)));
  // The buffer for the packed pixels first serves as `lines`.
  start_nchw<T>(call, n, first, count, block, stride, reinterpret_cast<std::byte*>(packed));
  for (int64_t k = 0; k < operands; k += chunk) {
    const int64_t length = operands - k < chunk ? operands - k : chunk;
    pack_pixels<T>(call, n, first, count, k, length, packed, panel_columns, chunk * panel_columns);
    const Sink sink{
        block,
        stride,
        k + length == operands,
        static_cast<std::byte*>(call.out.data) +
            (n * call.out.stride_n + first) * static_cast<int64_t>(sizeof(T)),
        call.out.stride_c,
        0,
        broadcast<Floats>(static_cast<float>(call.gain))};
    const Left left{static_cast<const Operand*>(call.weight) + k, call.weight_line, 1};
    multiply_block<T>(left, packed, chunk * panel_columns, call.cout, count, length, sink);
  }
}

// Packs the weight: [panel][operand][32] if the result is NHWC, else [output channel][operand].
template <class T>
void pack_weight(const LateralConnection& call, int64_t begin, int64_t end) {
  Operand* packed = static_cast<Operand*>(call.weight);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (!call.channels_last) {
      for (int64_t k = 0; k < call.operands; ++k) {
        packed[unit * call.weight_line + k] = weight_operand<T>(call, unit, k);
      }
      continue;
    }
    Operand* panel = packed + unit * call.weight_line;
    for (int64_t j = 0; j < panel_columns; ++j) {
      const int64_t row = unit * panel_columns + j;
      for (int64_t k = 0; k < call.operands; ++k) {
        panel[k * panel_columns + j] = row < call.cout ? weight_operand<T>(call, row, k) : Operand(0);
      }
    }
  }
}

template <class T>
void blocks(const LateralConnection& call, int64_t begin, int64_t end, std::byte* scratch) {
  const int64_t pixels = call.height * call.width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / call.blocks, first = unit % call.blocks * call.block;
    const int64_t count = pixels - first < call.block ? pixels - first : call.block;
    if (count <= 0) continue;
    (call.channels_last ? nhwc_block<T> : nchw_block<T>)(call, n, first, count, scratch);
  }
}

}  // namespace
