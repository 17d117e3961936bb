#pragma once

#include "../amx/sizes.h"

namespace fpn::cpu {

// out = 3x3 convolution of feature (stride 1, padding 1) + bias by AMX tiles.  A unit is a part of a block.
struct AmxOutputConv {
  Map feature;
  Result out;
  AmxWeight weight;
  const float* bias;  // padded to whole panels
  int64_t batch;
  int64_t blocks_down, blocks_across;
  int64_t tiles_across;   // per row of the map
  int64_t rows;           // pixels per tile
  bool flat;              // the tiles continue from row to row
  int64_t parts;          // of a block's output channels, each a unit
  int64_t pitch, plane;   // scratch memory: pixels from row to row, bytes from 32 channels to the next 32
  int64_t sums_at, offsets_at, scratch_bytes;
};

}  // namespace fpn::cpu

FPN_DECLARE_KERNEL(amx, output_conv_blocks, AmxOutputConv)
