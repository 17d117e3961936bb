// How a block of the 3x3 convolution lies in its task's scratch memory.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace fpn::cpu {

constexpr int64_t elements_of_tile = 16;
constexpr int64_t max_block = 96;

struct OutputConvScratch {
  explicit OutputConvScratch(const OutputConv& call) {
    const int64_t tiles = (call.block + 15) / 16 * 16, channels = (call.cin + 15) / 16 * 16;
    // One line more than a multiple of many: the sixteen elements of a tile would share few sets of the first cache.
    if (call.feature_channels_last) {
      input_channel = 1;
      input_tile = channels + 16;
      input_plane = call.block * input_tile + 16;
    } else {
      input_channel = tiles;
      input_tile = 1;
      input_plane = call.cin * tiles + 16;
    }
    sums = line_bytes(elements_of_tile * input_plane, 4);
    sums_plane = call.block * panel_columns + 16;
    // The direct sums take the same room: sixteen floats for each of four results a tile.
    failed = sums + line_bytes(elements_of_tile * sums_plane, 4);
    lists = failed + line_bytes(call.block, 1);
    bytes = lists + std::max(line_bytes(channels, 4), line_bytes(call.block * 4, 32));
  }

  int64_t input_plane, input_tile, input_channel;
  int64_t sums, sums_plane, failed, lists, bytes;
};

}  // namespace fpn::cpu
