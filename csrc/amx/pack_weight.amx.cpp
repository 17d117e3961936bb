// Packs a weight for AMX tiles: [panel][chunk][tap][half of the panel][pair of channels][output channel][2].

#include "../simd/transposes.h"
#include "tile_product.h"

namespace {

using fpn::cpu::AmxWeight;

// Up to 32 input channels of a tap, padded with zeros.
inline Register weight_line(const AmxWeight& weight, const uint16_t* from, int64_t channels) {
  if (weight.stride_in == 1) return _mm512_maskz_loadu_epi16(first_halves(channels), from);
  alignas(64) uint16_t line[tile_channels] = {};
  for (int64_t k = 0; k < channels; ++k) line[k] = from[k * weight.stride_in];
  return _mm512_load_si512(line);
}

}  // namespace

namespace fpn::cpu::amx {

// A unit is a chunk of a panel.
void pack_weight(const AmxWeight& weight, int64_t begin, int64_t end, std::byte*) {
  constexpr int64_t half = panel_channels / 2;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / weight.chunks * panel_channels, channel = unit % weight.chunks * tile_channels;
    const int64_t channels = weight.cin - channel < tile_channels ? weight.cin - channel : tile_channels;
    std::byte* to = weight.packed + unit * weight.taps * panel_bytes;
    for (int64_t tap = 0; tap < weight.taps; ++tap) {
      const uint16_t* from = static_cast<const uint16_t*>(weight.from) + channel * weight.stride_in +
          tap / 3 * weight.stride_y + tap % 3 * weight.stride_x;
      for (int64_t first = row; first < row + panel_channels; first += half, to += tile_bytes) {
        Register lines[half];
        for (int64_t i = 0; i < half; ++i) {
          const bool exists = first + i < weight.cout;
          lines[i] = exists ? weight_line(weight, from + (first + i) * weight.stride_out, channels)
                            : _mm512_setzero_si512();
        }
        transpose_registers<4>(lines);
        for (int64_t i = 0; i < half; ++i) store_register<false>(to + i * pixel_bytes, lines[i]);
      }
    }
  }
}

}  // namespace fpn::cpu::amx
