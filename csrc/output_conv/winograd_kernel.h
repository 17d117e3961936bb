#pragma once

#include <algorithm>

#include "../kernel.h"
#include "../simd/product_sizes.h"

namespace fpn::cpu {

// out = 3x3 convolution of feature (stride 1, padding 1) + bias by Winograd's F(2x2, 3x3), see winograd_tiles.h.
// A unit of output_conv_blocks is a block of tiles; of output_conv_weight, sixteen input channels of a panel.
struct OutputConv {
  Dtype dtype;
  Map feature;              // any strides; vectors hold channels (feature_channels_last) or pixels
  Result out;
  const void* weight_from;  // [cout, cin, 3, 3]
  int64_t weight_strides[4];
  const void* bias_from;    // [cout], or null
  int64_t bias_stride;
  float* weight;            // buffer for the transformed weight: [panel][16][cin][panel_columns]
  float* bias;              // buffer: [panels * panel_columns]
  int64_t batch, cin, cout;
  int64_t tiles_down, tiles_across;  // tiles of 2x2 results per map
  int64_t tiles;            // of all maps
  int64_t block;            // tiles per block
  bool feature_channels_last;
  bool channels_last;       // the result is NHWC
};

constexpr int64_t transformed_elements = 16;  // of a tile, 4x4
// Bytes of an entry of `lists`: a group of tiles, or a pixel to recompute.
constexpr int64_t list_entry = 32;

// Offsets of a block in its task's scratch memory.
struct OutputConvScratch {
  explicit OutputConvScratch(const OutputConv& call) {
    const int64_t lines = (call.block + 15) / 16 * 16, channels = (call.cin + 15) / 16 * 16;
    // One more cache line of padding: at a power of two the sixteen elements of a tile would share one set of L1.
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

  // Floats between transformed elements, tiles and channels of the input, and between elements of a panel's sums.
  int64_t input_plane, input_tile, input_channel, sums_plane;
  // Bytes from the start.  The transformed input is first.  Then the sums of one panel of output channels, one byte per
  // tile that marks results to recompute, and a list (or a pixel of zeros).
  int64_t sums, failed, lists, bytes;
};

}  // namespace fpn::cpu

FPN_DECLARE_FMA_KERNEL(output_conv_weight, OutputConv)
FPN_DECLARE_FMA_KERNEL(output_conv_blocks, OutputConv)
