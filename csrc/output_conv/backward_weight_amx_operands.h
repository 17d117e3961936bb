// Packs both operands of the weight's gradient, 32 positions (a step) at a time (see AmxOutputConvBackwardWeight).
//
// Left operand, grad: a tile is 16 channels by 32 positions.  Right operand, the feature: a tile is 16 pairs of
// positions by 16 channels by two.  It has two copies, with pairs that begin at even and at odd positions, so that
// every tap begins with a whole pair.
//
// If a pixel's channels are contiguous, each position has a pointer to its pixel or to zeros.  Other maps are first
// copied to lines of one channel each.
#pragma once

#include <algorithm>
#include <cstring>

#include "../amx/tile_product.h"
#include "../simd/transposes.h"

namespace {

constexpr int64_t step_positions = 32;
constexpr int64_t step_pairs = step_positions / 2;
// The i-th channel of either half of 32 channels: unpacking pairs groups channels in this order.
inline int64_t channel_of(int64_t half, int64_t i) { return i / 4 * 8 + half * 4 + i % 4; }

// Some channels of a map, addressed by position.
struct Positions {
  fpn::Map map;
  int64_t batch, pitch;
  int64_t first_channel, channels;

  const uint16_t* row(int64_t n, int64_t y) const {
    return static_cast<const uint16_t*>(map.data) + n * map.stride_n + y * map.stride_y + first_channel * map.stride_c;
  }
  bool channels_contiguous() const { return map.stride_c == 1; }

  // Calls each(offset, first pixel, pixels) per run of pixels among `count` positions.
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

// Some steps of a map's positions, and buffers for packing them.
struct Source {
  Positions from;
  int64_t position, steps;
  const uint16_t* zeros;    // a pixel of zeros
  const uint16_t** pixels;  // buffer: a pointer per position, to the one before and to those of the next step
  uint16_t* lines;          // buffer: 32 lines

  int64_t chunks() const { return (from.channels + tile_channels - 1) / tile_channels; }
  __mmask32 exist(int64_t chunk) const { return first_halves(from.channels - chunk * tile_channels); }
};

inline const uint16_t** find_pixels(const Source& source) {
  const int64_t count = (source.steps + 1) * step_positions + 1, stride = source.from.map.stride_x;
  std::fill(source.pixels, source.pixels + count, source.zeros);
  source.from.over(source.position - 1, count, [&](int64_t offset, const uint16_t* pixel, int64_t run) {
    for (int64_t i = 0; i < run; ++i, pixel += stride) source.pixels[offset + i] = pixel;
  });
  return source.pixels + 1;
}

// Copies the lines of a chunk of channels: `steps` steps and the step before.
constexpr int64_t line_steps = 8;
constexpr int64_t line_pitch = (1 + line_steps) * step_positions;
inline void find_lines(const Source& source, int64_t chunk, int64_t step, int64_t steps) {
  const fpn::Map& map = source.from.map;
  const int64_t channel = chunk * tile_channels, some = std::min(source.from.channels - channel, tile_channels);
  const int64_t position = source.position + (step - 1) * step_positions;
  std::memset(source.lines, 0, static_cast<size_t>(tile_channels * line_pitch * 2));
  source.from.over(position, (1 + steps) * step_positions, [&](int64_t offset, const uint16_t* pixel, int64_t run) {
    pixel += channel * map.stride_c;
    uint16_t* line = source.lines + offset;
    for (int64_t c = 0; c < some; ++c, pixel += map.stride_c, line += line_pitch) {
      if (map.stride_x == 1) {
        std::memcpy(line, pixel, static_cast<size_t>(run * 2));
      } else {
        for (int64_t i = 0; i < run; ++i) line[i] = pixel[i * map.stride_x];
      }
    }
  });
}

// The pixels of the next step are prefetched: with many channels they are too far apart for the hardware prefetcher.
inline void prefetch(const uint16_t* pixel) { __builtin_prefetch(pixel, 0, 2); }

// Transposes a step of 32 channels to two tiles of the left operand, `next` bytes apart.
inline void transpose_pixels(
    const uint16_t* const* pixels, int64_t channel, __mmask32 exist, std::byte* to, int64_t next) {
  for (int64_t half = 0; half < 2; ++half) {
    Register row[16];
    for (int64_t i = 0; i < 16; ++i) {
      const Register even = _mm512_maskz_loadu_epi16(exist, pixels[2 * i] + channel);
      const Register odd = _mm512_maskz_loadu_epi16(exist, pixels[2 * i + 1] + channel);
      prefetch(pixels[step_positions + half * 16 + i] + channel);
      row[i] = half == 0 ? unpack_low<2>(even, odd) : unpack_high<2>(even, odd);
    }
    transpose_registers<4>(row);
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t at = channel_of(half, i);
      store_register<false>(to + at / 16 * next + at % 16 * pixel_bytes, row[i]);
    }
  }
}

// Packs grad: per 16 channels (`next` bytes apart) one tile per step.
inline void pack_left(const Source& source, std::byte* to, int64_t next) {
  if (source.from.channels_contiguous()) {
    const uint16_t* const* pixels = find_pixels(source);
    for (int64_t step = 0; step < source.steps; ++step, pixels += step_positions, to += tile_bytes) {
      for (int64_t chunk = 0; chunk < source.chunks(); ++chunk) {
        transpose_pixels(pixels, chunk * tile_channels, source.exist(chunk), to + 2 * chunk * next, next);
      }
    }
    return;
  }
  for (int64_t chunk = 0; chunk < source.chunks(); ++chunk) {
    for (int64_t step = 0; step < source.steps; step += line_steps) {
      const int64_t some = std::min(source.steps - step, line_steps);
      find_lines(source, chunk, step, some);
      for (int64_t row = 0; row < tile_channels; ++row) {
        const uint16_t* line = source.lines + row * line_pitch + step_positions;
        std::byte* tile = to + (2 * chunk + row / 16) * next + step * tile_bytes + row % 16 * pixel_bytes;
        for (int64_t i = 0; i < some; ++i) {
          store_register<false>(tile + i * tile_bytes, load_register(line + i * step_positions));
        }
      }
    }
  }
}

// Pairs of a step of 32 channels, in two halves `next` bytes apart.  Odd pairs begin with the pixel before.
inline void pair_pixels(
    const uint16_t* const* pixels, int64_t channel, __mmask32 exist, std::byte* even, std::byte* odd, int64_t next) {
  Register before = _mm512_maskz_loadu_epi16(exist, pixels[-1] + channel);
  for (int64_t i = 0; i < step_positions; i += 2, even += pixel_bytes, odd += pixel_bytes) {
    const Register first = _mm512_maskz_loadu_epi16(exist, pixels[i] + channel);
    const Register second = _mm512_maskz_loadu_epi16(exist, pixels[i + 1] + channel);
    prefetch(pixels[step_positions + i] + channel);
    prefetch(pixels[step_positions + i + 1] + channel);
    store_register<false>(odd, unpack_low<2>(before, first));
    store_register<false>(odd + next, unpack_high<2>(before, first));
    store_register<false>(even, unpack_low<2>(first, second));
    store_register<false>(even + next, unpack_high<2>(first, second));
    before = second;
  }
}

// The same for half of the lines.
inline void pair_lines(const uint16_t* lines, int64_t half, std::byte* to) {
  Register row[16];
  for (int64_t i = 0; i < 16; ++i) row[i] = load_register(lines + channel_of(half, i) * line_pitch);
  transpose_registers<4>(row);
  for (int64_t i = 0; i < 16; ++i) store_register<false>(to + i * pixel_bytes, row[i]);
}

// Packs the feature: per 16 channels (`next` bytes apart) one tile of even pairs per step, and `odd` bytes further the
// tiles of odd pairs.
inline void pack_right(const Source& source, std::byte* to, int64_t next, int64_t odd) {
  if (source.from.channels_contiguous()) {
    const uint16_t* const* pixels = find_pixels(source);
    for (int64_t step = 0; step < source.steps; ++step, pixels += step_positions, to += tile_bytes) {
      for (int64_t chunk = 0; chunk < source.chunks(); ++chunk) {
        std::byte* even = to + 2 * chunk * next;
        pair_pixels(pixels, chunk * tile_channels, source.exist(chunk), even, even + odd, next);
      }
    }
    return;
  }
  for (int64_t chunk = 0; chunk < source.chunks(); ++chunk) {
    for (int64_t step = 0; step < source.steps; step += line_steps) {
      const int64_t some = std::min(source.steps - step, line_steps);
      find_lines(source, chunk, step, some);
      for (int64_t half = 0; half < 2; ++half) {
        std::byte* even = to + (2 * chunk + half) * next + step * tile_bytes;
        const uint16_t* line = source.lines;
        for (int64_t i = 0; i < some; ++i, even += tile_bytes) {
          line += step_positions;
          pair_lines(line, half, even);
          pair_lines(line - 1, half, even + odd);
        }
      }
    }
  }
}

}  // namespace
