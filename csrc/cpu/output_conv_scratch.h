// How a block of tiles of the 3x3 convolution lies in its task's scratch memory.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace fpn::cpu {

constexpr int64_t transformed_elements = 16;  // of a tile, 4x4
// Room in `lists` for an entry: a group of tiles, or a pixel to recompute.
constexpr int64_t list_entry = 32;

struct OutputConvScratch {
  explicit OutputConvScratch(const OutputConv& call) {
    const int64_t lines = (call.block + 15) / 16 * 16, channels = (call.cin + 15) / 16 * 16;
    // One cache line more than the data takes: at a power of two the sixteen elements of a tile, which are written one
    // after the other, would fall into one set of the first cache.
    constexpr int64_t cache_line = 16;
    if (call.feature_channels_last) {
      input_channel = 1;
      input_tile = channels + cache_line;
      input_plane = call.block * input_tile + cache_line;
    } else {
      input_channel = lines;
      input_tile = 1;
      input_plane = call.cin * input_channel + cache_line;
    }
    sums_plane = call.block * panel_columns + cache_line;
    sums = line_bytes(transformed_elements * input_plane, 4);
    failed = sums + line_bytes(transformed_elements * sums_plane, 4);
    lists = failed + line_bytes(call.block, 1);
    bytes = lists + std::max(line_bytes(4 * call.block, list_entry), line_bytes(channels, 4));
  }

  // Elements from one to the next: of a tile's transformed elements, tiles, channels; of the sums of a panel.
  int64_t input_plane, input_tile, input_channel, sums_plane;
  // Bytes from the start: the transformed input comes first, then the sums of one panel of output channels, a byte a
  // tile that says whether its results have to be recomputed, and a list (or a pixel of zeros).
  int64_t sums, failed, lists, bytes;
};

}  // namespace fpn::cpu
