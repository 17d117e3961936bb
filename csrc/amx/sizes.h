// Sizes that the AMX kernels (tile_product.h) and their drivers share, and the packed weight.
#pragma once

#include "../kernel.h"

namespace fpn::cpu {

constexpr int64_t amx_tile_pixels = 16;
constexpr int64_t amx_tile_channels = 32;
constexpr int64_t amx_pixel_bytes = 64;
constexpr int64_t amx_panel_channels = 32;
constexpr int64_t amx_panel_bytes = 2048;
// Accumulators of a group of tiles; there are two such buffers.
constexpr int64_t amx_sums_bytes = 3 * amx_tile_pixels * amx_panel_channels * 4;

// A bfloat16 weight [cout, cin, taps], and the buffer for its packed copy.
struct AmxWeight {
  const void* from;
  int64_t stride_out, stride_in, stride_y, stride_x;
  int64_t cout, cin, taps;
  int64_t chunks, panels;  // of 32 input channels, of 32 output channels
  std::byte* packed;
};

}  // namespace fpn::cpu

FPN_DECLARE_KERNEL(amx, pack_weight, AmxWeight)
