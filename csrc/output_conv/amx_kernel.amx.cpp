// The 3x3 convolution of bfloat16 maps as a matrix product by AMX tiles.
//
// A block of the map is copied to scratch memory with a border of one pixel (zero beyond the map's edge).  There each
// tap of the kernel is a constant offset, and pixels are 64 bytes apart.  A tile is up to sixteen pixels of a row; on
// narrow maps tiles continue from row to row, and results on the border between rows are not written.

#include "amx_kernel.h"

#include <algorithm>
#include <utility>

#include "../amx/copy_pixels.h"
#include "../amx/write_results.h"

namespace {

using fpn::cpu::AmxOutputConv;

struct AddBias {
  const float* bias;  // padded to whole panels
  auto channels(int64_t channel) const {
    return [values = _mm512_loadu_ps(bias + channel)](__m512 sums, int64_t) { return _mm512_add_ps(sums, values); };
  }
};

struct Block {
  int64_t n, y, x, height, width;
  int64_t tiles_across;  // per row
};

inline Block block_of(const AmxOutputConv& call, int64_t index) {
  const int64_t across = index % call.blocks_across, rest = index / call.blocks_across;
  const int64_t down = rest % call.blocks_down;
  Block block{};
  block.n = rest / call.blocks_down;
  block.y = call.feature.height * down / call.blocks_down;
  block.height = call.feature.height * (down + 1) / call.blocks_down - block.y;
  const int64_t tile = call.tiles_across * across / call.blocks_across;
  block.tiles_across = call.tiles_across * (across + 1) / call.blocks_across - tile;
  block.x = call.flat ? 0 : tile * call.rows;
  const int64_t left = call.feature.width - block.x;
  block.width = call.flat || left < block.tiles_across * call.rows ? left : block.tiles_across * call.rows;
  return block;
}

// Copies the block and its border.
void copy_block(const AmxOutputConv& call, const Block& block, std::byte* to) {
  const fpn::Map& map = call.feature;
  const uint16_t* from = static_cast<const uint16_t*>(map.data) + block.n * map.stride_n;
  const int64_t left = block.x == 0 ? 1 : 0;
  const int64_t end = block.x + block.width + 1 < map.width ? block.x + block.width + 1 : map.width;
  const int64_t count = end - (block.x - 1 + left), right = call.pitch - left - count;
  for (int64_t row = 0; row < block.height + 2; ++row) {
    const int64_t y = block.y - 1 + row;
    std::byte* line = to + row * call.pitch * pixel_bytes;
    const bool exists = y >= 0 && y < map.height;
    for (int64_t chunk = 0; chunk < call.weight.chunks; ++chunk) {
      std::byte* pixels = line + chunk * call.plane;
      if (!exists) {
        std::memset(pixels, 0, static_cast<size_t>(call.pitch * pixel_bytes));
        continue;
      }
      std::memset(pixels, 0, static_cast<size_t>(left * pixel_bytes));
      std::memset(pixels + (left + count) * pixel_bytes, 0, static_cast<size_t>(right * pixel_bytes));
    }
    if (!exists) continue;
    const uint16_t* pixels = from + y * map.stride_y + (block.x - 1 + left) * map.stride_x;
    copy_pixels(map, pixels, call.weight.cin, count, line + left * pixel_bytes, call.plane);
  }
}

// The index of a tile's first pixel in scratch memory.
inline int64_t tile_start(const AmxOutputConv& call, const Block& block, int64_t tile) {
  if (call.flat) return tile * tile_pixels;
  return tile / block.tiles_across * call.pitch + tile % block.tiles_across * call.rows;
}

inline int64_t tile_count(const AmxOutputConv& call, const Block& block) {
  if (!call.flat) return block.height * block.tiles_across;
  return ((block.height - 1) * call.pitch + block.width + tile_pixels - 1) / tile_pixels;
}

// The pixels' offsets in the result; -1 on the border and beyond the block.
void find_offsets(const AmxOutputConv& call, const Block& block, int64_t* offsets) {
  const fpn::Result& out = call.out;
  for (int64_t row = 0; row < block.height; ++row, offsets += call.pitch) {
    const int64_t first = (block.y + row) * out.stride_y + block.x * out.stride_x;
    for (int64_t x = 0; x < call.pitch; ++x) offsets[x] = x < block.width ? first + x * out.stride_x : -1;
  }
  for (int64_t x = 0; x < tile_pixels; ++x) offsets[x] = -1;
}

// Computes panels first .. last of the block's result.
void convolve_block(const AmxOutputConv& call, const Block& block, int64_t first, int64_t last, std::byte* scratch) {
  copy_block(call, block, scratch);
  float* sums = reinterpret_cast<float*>(scratch + call.sums_at);
  float* held = sums + group_tiles * tile_pixels * panel_channels;
  int64_t* offsets = reinterpret_cast<int64_t*>(scratch + call.offsets_at);
  find_offsets(call, block, offsets);
  int64_t taps[9];
  for (int64_t tap = 0; tap < 9; ++tap) taps[tap] = (tap / 3 * call.pitch + tap % 3) * pixel_bytes;
  const Sum sum{call.weight.chunks, call.plane, pixel_bytes, taps, 9};
  Writer writer(call.out, block.n, call.weight.cout, call.rows, offsets, AddBias{call.bias});
  const int64_t tiles = tile_count(call, block), groups = (tiles + group_tiles - 1) / group_tiles;
  for (int64_t panel = first; panel < last; ++panel) {
    const std::byte* weight = call.weight.packed + panel * call.weight.chunks * 9 * panel_bytes;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = tiles * group / groups, count = tiles * (group + 1) / groups - begin;
      const std::byte* left[group_tiles] = {};
      int64_t starts[group_tiles] = {};
      for (int64_t i = 0; i < count; ++i) {
        starts[i] = tile_start(call, block, begin + i);
        left[i] = scratch + starts[i] * pixel_bytes;
      }
      multiply(count, left, weight, sum, sums, writer);
      writer.finish();
      writer.take(sums, panel, starts, count, std::max<int64_t>(1, sum.chunks * sum.tap_count));
      std::swap(sums, held);
    }
  }
  writer.finish();
}

}  // namespace

namespace fpn::cpu::amx {

void output_conv_blocks(const AmxOutputConv& call, int64_t begin, int64_t end, std::byte* scratch) {
  const TileRegisters registers(call.rows);
  const int64_t panels = call.weight.panels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % call.parts;
    const int64_t first = panels * part / call.parts, last = panels * (part + 1) / call.parts;
    convolve_block(call, block_of(call, unit / call.parts), first, last, scratch);
  }
}

}  // namespace fpn::cpu::amx
