#pragma once

#include "../amx/sizes.h"
#include "kernel.h"

namespace fpn::cpu {

// Bytes of what one pixel reads of the top (TopOffsets in amx_kernel.amx.cpp).
constexpr int64_t amx_top_offsets_bytes = 40;

// A lateral connection of bfloat16 maps by AMX tiles.  A unit is a block of pixels.
struct AmxLateralConnection {
  LateralConnection call;
  AmxWeight weight;
  int64_t plane;  // bytes from 32 channels to the next 32 in scratch memory
  int64_t sums_at, offsets_at, top_offsets_at, scratch_bytes;
  bool in_place;  // whole tiles of the feature are read without a copy
  bool fetches;   // the maps are too large for the caches
};

}  // namespace fpn::cpu

FPN_DECLARE_KERNEL(amx, lateral_connection_blocks, AmxLateralConnection)
