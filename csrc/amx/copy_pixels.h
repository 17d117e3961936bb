// Copies pixels of a map to the layout of AMX tiles: [chunk of 32 channels][pixel][channel], 64 bytes per pixel.
#pragma once

#include <cstring>

#include "../simd/transposes.h"
#include "tile_product.h"

namespace {

// Up to 32 channels of up to 32 pixels of a map whose rows are contiguous.
inline void copy_square(const uint16_t* from, int64_t stride_c, int64_t channels, int64_t count, uint16_t* to) {
  if (channels == tile_channels && count == tile_of<uint16_t>) {
    return transpose_tile<false>(from, stride_c, to, tile_channels);
  }
  alignas(64) uint16_t square[32][32], transposed[32][32];
  for (int64_t c = 0; c < tile_channels; ++c) {
    const __mmask32 exist = c < channels ? first_halves(count) : 0;
    _mm512_store_si512(square[c], _mm512_maskz_loadu_epi16(exist, from + (c < channels ? c * stride_c : 0)));
  }
  transpose_tile<false>(&square[0][0], tile_channels, &transposed[0][0], tile_channels);
  std::memcpy(to, transposed, static_cast<size_t>(count * pixel_bytes));
}

// Pixels whose channels are contiguous.
inline void copy_channels_last(
    const uint16_t* from, int64_t stride_x, int64_t channels, int64_t count, uint16_t* to, int64_t next_chunk) {
  const int64_t whole = channels / tile_channels;
  const __mmask32 tail = first_halves(channels - whole * tile_channels);
  for (int64_t i = 0; i < count; ++i, from += stride_x, to += tile_channels) {
    for (int64_t chunk = 0; chunk < whole; ++chunk) {
      _mm512_store_si512(to + chunk * next_chunk, _mm512_loadu_si512(from + chunk * tile_channels));
    }
    if (tail != 0) {
      const __m512i rest = _mm512_maskz_loadu_epi16(tail, from + whole * tile_channels);
      _mm512_store_si512(to + whole * next_chunk, rest);
    }
  }
}

// `count` pixels of one row, from `from`; chunks of channels are `plane` bytes apart.
inline void copy_pixels(
    const fpn::Map& map, const uint16_t* from, int64_t channels, int64_t count, std::byte* to, int64_t plane) {
  uint16_t* line = reinterpret_cast<uint16_t*>(to);
  const int64_t next_chunk = plane / static_cast<int64_t>(sizeof(uint16_t));
  if (map.stride_c == 1) return copy_channels_last(from, map.stride_x, channels, count, line, next_chunk);
  for (int64_t c = 0; c < channels; c += tile_channels, line += next_chunk) {
    const uint16_t* channel = from + c * map.stride_c;
    const int64_t some = channels - c < tile_channels ? channels - c : tile_channels;
    if (map.stride_x == 1) {
      for (int64_t x = 0; x < count; x += tile_of<uint16_t>) {
        const int64_t pixels = count - x < tile_of<uint16_t> ? count - x : tile_of<uint16_t>;
        copy_square(channel + x, map.stride_c, some, pixels, line + x * tile_channels);
      }
      continue;
    }
    for (int64_t x = 0; x < count; ++x) {
      for (int64_t k = 0; k < tile_channels; ++k) {
        line[x * tile_channels + k] = k < some ? channel[x * map.stride_x + k * map.stride_c] : uint16_t{0};
      }
    }
  }
}

}  // namespace
