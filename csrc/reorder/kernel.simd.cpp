#include "kernel.h"

#include <cstring>

#include "../simd/transposes.h"

namespace {

using fpn::cpu::Reorder;

template <class T>
void copy_line(const T* from, T* to, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns.  Whole tiles first, then the remainder.
template <bool streaming, class T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t tile = tile_of<T>;
  const int64_t whole_rows = rows / tile * tile, whole_columns = columns / tile * tile;
  for (int64_t i = 0; i < whole_rows; i += tile) {
    for (int64_t j = 0; j < whole_columns; j += tile) {
      transpose_tile<streaming>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

template <class T, bool streaming>
void blocks(const Reorder& call, int64_t begin, int64_t end) {
  const int64_t channels = call.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % call.blocks, line = unit / call.blocks % call.lines;
    const int64_t n = unit / call.blocks / call.lines;
    const int64_t x = block * call.block, count = call.length - x < call.block ? call.length - x : call.block;
    const T* from = static_cast<const T*>(call.source.data) + n * call.source.stride_n + line * call.source.stride_y +
        x * call.source.stride_x;
    T* to = static_cast<T*>(call.out.data) + n * call.out.stride_n + line * call.out.stride_y + x * call.out.stride_x;
    const int64_t from_c = call.source.stride_c, from_x = call.source.stride_x;
    const int64_t to_c = call.out.stride_c, to_x = call.out.stride_x;
    if (from_c == 1 && to_x == 1) {
      transpose<streaming>(from, from_x, to, to_c, count, channels);
    } else if (from_x == 1 && to_c == 1) {
      transpose<streaming>(from, from_c, to, to_x, channels, count);
    } else if (from_c == 1 && to_c == 1) {
      for (int64_t i = 0; i < count; ++i) copy_line(from + i * from_x, to + i * to_x, channels);
    } else if (from_x == 1 && to_x == 1) {
      for (int64_t c = 0; c < channels; ++c) copy_line(from + c * from_c, to + c * to_c, count);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < count; ++i) to[c * to_c + i * to_x] = from[c * from_c + i * from_x];
      }
    }
  }
}

template <class T>
void blocks(const Reorder& call, int64_t begin, int64_t end) {
  if (!call.streaming) return blocks<T, false>(call, begin, end);
  blocks<T, true>(call, begin, end);
  end_of_stream();
}

}  // namespace

namespace fpn::cpu::FPN_ISA {

void reorder_blocks(const Reorder& call, int64_t begin, int64_t end, std::byte*) {
  switch (call.element) {
    case 2: return blocks<uint16_t>(call, begin, end);
    case 4: return blocks<uint32_t>(call, begin, end);
    case 8: return blocks<uint64_t>(call, begin, end);
  }
}

}  // namespace fpn::cpu::FPN_ISA
