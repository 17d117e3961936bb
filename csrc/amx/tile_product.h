// Matrix products of bfloat16 by AMX tiles, summed in float32.
//
// A left tile is up to 16 pixels by 32 channels, 64 contiguous bytes per pixel.  A right tile is 32 channels by 16
// output channels, in pairs of channels.  A group of three tiles of pixels by two of output channels stays in
// registers: seven loads per six products, and only the weight is streamed from L2.  One core of an Intel Xeon with
// AMX: 2.1 TFLOP/s; 2.0 with groups of six by one, 1.9 with two by two; 3.13 for products from registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../simd/vectors.h"
#include "sizes.h"

namespace {

constexpr int64_t tile_pixels = fpn::cpu::amx_tile_pixels;        // rows per tile
constexpr int64_t tile_channels = fpn::cpu::amx_tile_channels;    // per row of the left operand
constexpr int64_t pixel_bytes = fpn::cpu::amx_pixel_bytes;        // of such a row
constexpr int64_t panel_channels = fpn::cpu::amx_panel_channels;  // output channels of two tiles
constexpr int64_t panel_bytes = fpn::cpu::amx_panel_bytes;
constexpr int64_t tile_bytes = panel_bytes / 2;
constexpr int64_t group_tiles = 3;
static_assert(fpn::cpu::amx_sums_bytes == group_tiles * tile_pixels * panel_channels * 4);

// A compiler barrier: GCC 12's tile intrinsics do not declare that they access memory.
inline void order_memory() { asm volatile("" ::: "memory"); }

// Configures the tile registers for tiles of `rows` pixels, and releases them at the end of the scope.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int i = 0; i < 8; ++i) {
      configuration.row_bytes[i] = pixel_bytes;
      configuration.rows[i] = static_cast<uint8_t>(i < 7 ? rows : 16);
    }
    asm volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }
};

// The terms of a sum: chunks of 32 channels, times the taps of the kernel.  Offsets in bytes from a tile's first pixel;
// the weight's panels are contiguous.
struct Sum {
  int64_t chunks, chunk_stride, pixel_stride;
  const int64_t* taps;
  int64_t tap_count;
};

// Computes sums[tile][row][panel_channels] for the tiles at left[0 .. tiles], and calls meanwhile.step() after each
// tap.  Registers 0 to 5 are accumulators, 6 the left and 7 the right operand (16 rows).
template <int tiles, class Meanwhile>
inline void multiply(
    const std::byte* const* left, const std::byte* right, const Sum& sum, float* sums, Meanwhile& meanwhile) {
  static_assert(tiles >= 1 && tiles <= group_tiles);
  order_memory();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (tiles > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  if constexpr (tiles > 2) {
    _tile_zero(4);
    _tile_zero(5);
  }
  const std::byte* first = left[0];
  const std::byte* second = left[tiles > 1 ? 1 : 0];
  const std::byte* third = left[tiles > 2 ? 2 : 0];
  for (int64_t chunk = 0; chunk < sum.chunks; ++chunk) {
    for (int64_t tap = 0; tap < sum.tap_count; ++tap, right += panel_bytes) {
      const int64_t at = chunk * sum.chunk_stride + sum.taps[tap];
      // The right operand is loaded again, from L1: no register is free to keep it.
      _tile_loadd(6, first + at, sum.pixel_stride);
      _tile_loadd(7, right, pixel_bytes);
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(7, right + tile_bytes, pixel_bytes);
      _tile_dpbf16ps(1, 6, 7);
      if constexpr (tiles > 1) {
        _tile_loadd(6, second + at, sum.pixel_stride);
        _tile_dpbf16ps(3, 6, 7);
        _tile_loadd(7, right, pixel_bytes);
        _tile_dpbf16ps(2, 6, 7);
      }
      if constexpr (tiles > 2) {
        _tile_loadd(6, third + at, sum.pixel_stride);
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, right + tile_bytes, pixel_bytes);
        _tile_dpbf16ps(5, 6, 7);
      }
      meanwhile.step();
    }
  }
  constexpr int64_t stride = panel_channels * sizeof(float);
  constexpr int64_t half = panel_channels / 2, next = tile_pixels * panel_channels;
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + half, stride);
  if constexpr (tiles > 1) {
    _tile_stored(2, sums + next, stride);
    _tile_stored(3, sums + next + half, stride);
  }
  if constexpr (tiles > 2) {
    _tile_stored(4, sums + 2 * next, stride);
    _tile_stored(5, sums + 2 * next + half, stride);
  }
  order_memory();
}

template <class Meanwhile>
inline void multiply(
    int64_t tiles,
    const std::byte* const* left,
    const std::byte* right,
    const Sum& sum,
    float* sums,
    Meanwhile& meanwhile) {
  switch (tiles) {
    case 3: return multiply<3>(left, right, sum, sums, meanwhile);
    case 2: return multiply<2>(left, right, sum, sums, meanwhile);
    default: return multiply<1>(left, right, sum, sums, meanwhile);
  }
}

// A mask of the first `count` of 32 elements of 16 bits; none if it is negative.
inline __mmask32 first_halves(int64_t count) {
  return count >= 32 ? __mmask32(0xffffffffu) : count <= 0 ? __mmask32(0) : (__mmask32(1) << count) - 1;
}

}  // namespace
