// The input transform B^T d B of a block of tiles.
#pragma once

#include "winograd_tiles.h"

namespace {

// B^T of four vectors: the four rows, or columns, of a tile.
inline void input_line(Floats d0, Floats d1, Floats d2, Floats d3, Floats (&to)[4]) {
  to[0] = d0 - d2;
  to[1] = d1 + d2;
  to[2] = d2 - d1;
  to[3] = d1 - d3;
}

// Prefetch distances: the hardware prefetches neither four rows of pixels nor rows of many channels.  2 % faster on C2
// with 256 channels; prefetching the whole next block during the products gained no more.
constexpr int64_t tiles_ahead = 4;
constexpr int64_t channels_ahead = 8;

// NHWC: a vector is sixteen channels of a pixel.  `padding` is a pixel of zeros.
template <class T>
void input_channels_last(
    const OutputConv& call, int64_t first, int64_t count, const TransformedInput& input, const T* padding) {
  const Map& map = call.feature;
  over_runs(call, first, count, [&](const Run& run) {
    const T* data = static_cast<const T*>(map.data) + run.n * map.stride_n;
    for (int64_t t = 0; t < run.count; ++t) {
      const T* pixels[4][4];
      for (int i = 0; i < 4; ++i) {
        const int64_t y = 2 * run.row - 1 + i;
        for (int j = 0; j < 4; ++j) {
          const int64_t x = 2 * (run.column + t) - 1 + j;
          const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
          pixels[i][j] = inside ? data + y * map.stride_y + x * map.stride_x : padding;
        }
      }
      float* to = input.data + (run.at + t) * input.tile;
      const auto step = [&](int64_t c, auto read) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          for (int j = 2; j < 4; ++j) __builtin_prefetch(pixels[i][j] + tiles_ahead * map.stride_x + c, 0, 3);
        }
        Floats lines[4][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Floats column[4];
          input_line(
              read(pixels[0][j] + c), read(pixels[1][j] + c), read(pixels[2][j] + c), read(pixels[3][j] + c), column);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) lines[i][j] = column[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          Floats row[4];
          input_line(lines[i][0], lines[i][1], lines[i][2], lines[i][3], row);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * input.plane + c, row[j]);
        }
      };
      int64_t c = 0;
      for (; c + 16 <= call.cin; c += 16) step(c, [](const T* from) { return load(from); });
      if (c < call.cin) {
        const Elements tail = first_elements(call.cin - c);
        step(c, [&](const T* from) { return load_masked(from, tail); });
      }
    }
  });
}

// Up to sixteen neighbouring tiles: 34 pixels of each of four rows.
struct Group {
  int64_t corner;    // offset of row 0, column 0, which may be in the padding
  uint64_t columns;  // mask of the 34 columns that exist
  unsigned rows;     // mask of the four rows that exist
  Elements tiles;    // mask of the sixteen tiles that exist
  int64_t at;        // the first tile's index in the block
};
static_assert(sizeof(Group) <= fpn::cpu::list_entry);

// Copies a row of a group whose pixels are not contiguous.
template <class T>
inline void line_up(const T* from, int64_t stride, uint64_t columns, T* to) {
  for (int j = 0; j < 34; ++j) to[j] = (columns >> j & 1) != 0 ? from[j * stride] : T{};
}

// Lists the groups of a block and returns their number.
inline int64_t group_tiles(const OutputConv& call, int64_t first, int64_t count, Group* groups) {
  const Map& map = call.feature;
  int64_t number = 0;
  over_runs(call, first, count, [&](const Run& run) {
    for (int64_t t = 0; t < run.count; t += 16) {
      const int64_t y = 2 * run.row - 1, x = 2 * (run.column + t) - 1;
      Group& group = groups[number++];
      group.corner = run.n * map.stride_n + y * map.stride_y + x * map.stride_x;
      const int64_t right = map.width - x;
      group.columns = right >= 34 ? (uint64_t{1} << 34) - 1 : (uint64_t{1} << right) - 1;
      if (x < 0) group.columns &= ~uint64_t{1};
      group.rows = 0;
      for (int i = 0; i < 4; ++i) group.rows |= (y + i >= 0 && y + i < map.height ? 1u : 0u) << i;
      group.tiles = first_elements(run.count - t);
      group.at = run.at + t;
    }
  });
  return number;
}

// NCHW, or any strides (`strided`): a vector is sixteen tiles of a channel.
template <class T, bool strided>
void input_pixels(const OutputConv& call, int64_t first, int64_t count, const TransformedInput& input, Group* groups) {
  const Map& map = call.feature;
  const int64_t number = group_tiles(call, first, count, groups);
  constexpr int starts[4] = {0, 16, 2, 18};
  for (int64_t c = 0; c < call.cin; ++c) {
    const T* channel = static_cast<const T*>(map.data) + c * map.stride_c;
    for (int64_t g = 0; g < number; ++g) {
      const Group& group = groups[g];
      Floats pixels[4][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const bool exists = (group.rows >> i & 1) != 0;
        const T* row = channel + group.corner + i * map.stride_y;
        __builtin_prefetch(row + channels_ahead * map.stride_c + 16, 0, 3);
        __builtin_prefetch(row + channels_ahead * map.stride_c + 32, 0, 3);
        uint64_t columns = exists ? group.columns : 0;
        [[maybe_unused]] T packed[34];
        if constexpr (strided) {
          line_up(row, map.stride_x, columns, packed);
          row = packed;
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          pixels[i][j] = load_masked(row + starts[j], static_cast<Elements>(columns >> starts[j]));
        }
      }
      Floats lines[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Floats column[4];
        input_line(pixels[0][j], pixels[1][j], pixels[2][j], pixels[3][j], column);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) lines[i][j] = column[i];
      }
      float* to = input.data + c * input.channel + group.at;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // Columns 0 and 1 of sixteen tiles are the even and odd pixels, columns 2 and 3 the same from the third pixel.
        Floats row[4];
        Floats across[4];
        deinterleave(lines[i][0], lines[i][1], across[0], across[1]);
        deinterleave(lines[i][2], lines[i][3], across[2], across[3]);
        input_line(across[0], across[1], across[2], across[3], row);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_masked(to + (4 * i + j) * input.plane, group.tiles, row[j]);
      }
    }
  }
}

}  // namespace
