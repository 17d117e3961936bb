// Rounds the sums once and stores them in the weight's order.
#pragma once

#include "../amx/tile_product.h"
#include "../simd/transposes.h"

namespace {

constexpr int64_t taps = 9;

// 32 input channels of a tap from the two halves (channel_of in backward_weight_amx_operands.h).
inline __m512i rounded_line(const float* first, const float* second) {
  const __m256i low = to_bfloat16(load(first)), high = to_bfloat16(load(second));
  const __m256i a = _mm256_unpacklo_epi64(low, high), b = _mm256_unpackhi_epi64(low, high);
  const __m256i begin = _mm256_permute2x128_si256(a, b, 0x20), end = _mm256_permute2x128_si256(a, b, 0x31);
  return _mm512_inserti64x4(_mm512_castsi256_si512(begin), end, 1);
}

// Reorders [tap][channel] to [channel][tap]: element e of 288 is tap e % 9 of channel e / 9.
struct TapsOfChannels {
  __m512i channel[taps];
  __mmask32 from[taps][taps];  // [line of the result][tap]

  TapsOfChannels() {
    for (int64_t line = 0; line < taps; ++line) {
      alignas(64) uint16_t index[32];
      for (int64_t tap = 0; tap < taps; ++tap) from[line][tap] = 0;
      for (int64_t i = 0; i < 32; ++i) {
        const int64_t element = line * 32 + i;
        index[i] = static_cast<uint16_t>(element / taps);
        from[line][element % taps] |= __mmask32(1) << i;
      }
      channel[line] = _mm512_load_si512(index);
    }
  }

  void store(const __m512i* lines, int64_t channels, uint16_t* to) const {
    const int64_t elements = channels * taps;
    for (int64_t line = 0; line * 32 < elements; ++line) {
      __m512i value = _mm512_setzero_si512();
      for (int64_t tap = 0; tap < taps; ++tap) {
        value = _mm512_mask_permutexvar_epi16(value, from[line][tap], channel[line], lines[tap]);
      }
      _mm512_mask_storeu_epi16(to + line * 32, first_halves(elements - line * 32), value);
    }
  }
};

// Whether all of `count` floats are finite; a multiple of sixteen.
inline bool all_finite(const float* values, int64_t count) {
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i += 16) bad |= _mm512_fpclass_ps_mask(_mm512_loadu_ps(values + i), 0x99);
  return bad == 0;
}

}  // namespace
