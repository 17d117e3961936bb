// Pixels as the weight's gradient reads them, 32 positions at a time (see AmxOutputConvBackward).
//
// Left operand, of grad: a tile is sixteen channels by 32 positions.  Right operand, of the feature: a tile is sixteen
// pairs of positions by sixteen channels by two, and there are two copies, with pairs from the even positions on and
// from the odd ones.  So any tap begins with a whole pair, whatever the distance of two rows.
//
// Where a pixel's channels lie side by side each position has a pointer, to its pixel or to zeros; other maps pass
// through lines of one channel each.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/maps.h"
#include "amx.h"
#include "transposes.h"

namespace {

constexpr int64_t step_positions = 32;
constexpr int64_t step_pairs = step_positions / 2;
// The sixteen channels of a tile of the feature, of 32: those that unpacking pairs leaves together.
inline int64_t channel_of(int64_t half, int64_t i) { return i / 4 * 8 + half * 4 + i % 4; }

// A map as positions, and some of its channels.
struct Positions {
  fpn::Map map;
  int64_t batch, pitch;
  int64_t first_channel, channels;

  const uint16_t* row(int64_t n, int64_t y) const {
    return static_cast<const uint16_t*>(map.data) + n * map.stride_n + y * map.stride_y + first_channel * map.stride_c;
  }
  bool side_by_side() const { return map.stride_c == 1; }

  // Calls each(offset, first pixel, pixels) for the pixels among `count` positions.
  template <class Each>
  void over(int64_t position, int64_t count, Each&& each) const {
    const int64_t end = position + count;
    int64_t at = std::max<int64_t>(position, 0);
    for (int64_t line = at / pitch; at < end; ++line, at = line * pitch) {
      const int64_t n = line / (map.height + 1), y = line % (map.height + 1), x = at - line * pitch;
      if (n >= batch) return;
      const int64_t pixels = std::min(map.width - x, end - at);
      if (y < map.height && pixels > 0) each(at - position, row(n, y) + x * map.stride_x, pixels);
    }
  }
};

// A pointer for each of `count` positions.
inline void find_pixels(
    const Positions& from, int64_t position, int64_t count, const uint16_t* zeros, const uint16_t** pixels) {
  std::fill(pixels, pixels + count, zeros);
  from.over(position, count, [&](int64_t offset, const uint16_t* pixel, int64_t some) {
    for (int64_t i = 0; i < some; ++i, pixel += from.map.stride_x) pixels[offset + i] = pixel;
  });
}

// Lines of 32 channels, of 32 positions before `position` and `count` from it on.
constexpr int64_t line_positions = 256;
constexpr int64_t line_pitch = line_positions + step_positions;
inline void find_lines(const Positions& from, int64_t position, int64_t count, int64_t channel, uint16_t* lines) {
  const int64_t some = std::min(from.channels - channel, tile_channels), stride = from.map.stride_x;
  std::memset(lines, 0, static_cast<size_t>(tile_channels * line_pitch * 2));
  from.over(position - step_positions, count + step_positions, [&](int64_t offset, const uint16_t* pixel, int64_t run) {
    pixel += channel * from.map.stride_c;
    uint16_t* line = lines + offset;
    for (int64_t c = 0; c < some; ++c, pixel += from.map.stride_c, line += line_pitch) {
      if (stride == 1) {
        std::memcpy(line, pixel, static_cast<size_t>(run * 2));
      } else {
        for (int64_t i = 0; i < run; ++i) line[i] = pixel[i * stride];
      }
    }
  });
}

// Half of 32 pixels of 32 channels as two tiles of the left operand, `next` bytes from one to the other.
inline void turn_pixels(
    const uint16_t* const* pixels, int64_t channel, __mmask32 exist, int64_t half, std::byte* to, int64_t next) {
  Register row[16];
  for (int i = 0; i < 16; ++i) {
    const Register even = _mm512_maskz_loadu_epi16(exist, pixels[2 * i] + channel);
    const Register odd = _mm512_maskz_loadu_epi16(exist, pixels[2 * i + 1] + channel);
    row[i] = half == 0 ? unpack_low<2>(even, odd) : unpack_high<2>(even, odd);
  }
  transpose_registers<4>(row);
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t at = channel_of(half, i);
    store_register<false>(to + at / 16 * next + at % 16 * pixel_bytes, row[i]);
  }
}

// A few pairs of 32 channels in two halves `next` bytes apart; the odd ones begin with the pixel before.
constexpr int64_t few_pairs = 4;
inline void pair_pixels(
    const uint16_t* const* pixels, int64_t channel, __mmask32 exist, std::byte* even, std::byte* odd, int64_t next) {
  Register before = _mm512_maskz_loadu_epi16(exist, pixels[-1] + channel);
  for (int64_t i = 0; i < few_pairs; ++i, even += pixel_bytes, odd += pixel_bytes) {
    const Register first = _mm512_maskz_loadu_epi16(exist, pixels[2 * i] + channel);
    const Register second = _mm512_maskz_loadu_epi16(exist, pixels[2 * i + 1] + channel);
    store_register<false>(odd, unpack_low<2>(before, first));
    store_register<false>(odd + next, unpack_high<2>(before, first));
    store_register<false>(even, unpack_low<2>(first, second));
    store_register<false>(even + next, unpack_high<2>(first, second));
    before = second;
  }
}

// The pairs of a step, of half of the lines.
inline void pair_lines(const uint16_t* lines, int64_t half, std::byte* to) {
  Register row[16];
  for (int64_t i = 0; i < 16; ++i) row[i] = load_register(lines + channel_of(half, i) * line_pitch);
  transpose_registers<4>(row);
  for (int64_t i = 0; i < 16; ++i) store_register<false>(to + i * pixel_bytes, row[i]);
}

}  // namespace
