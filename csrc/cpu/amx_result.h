// The sums of a group of tiles as pixels of the result: what is added to them, one rounding, in either layout.
//
// It is done in small jobs between the products of the next group: the tiles' unit works on while the vectors' writes.
// At C3 (256 channels, one core of an Intel Xeon with AMX) the 3x3 convolution took 12.5 ms with the jobs after the
// products, and the products alone 9.6.
#pragma once

#include <algorithm>

#include "../common/maps.h"
#include "amx.h"
#include "transposes.h"

namespace {

// By the instruction that takes denormal numbers for zero, as the products do.
inline __m512i rounded(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Where the block's pixels lie in the result's map, by their place in scratch memory; below zero where there is none.
using Places = const int64_t*;

// `Add` says what becomes of the sums: channels(channel) gives a function of sixteen channels of a pixel, and its place.
template <class Add>
class Writer {
 public:
  Writer(const fpn::Result& out, int64_t n, int64_t cout, int64_t rows, Places places, const Add& add)
      : out_(out),
        map_(static_cast<uint16_t*>(out.data) + n * out.stride_n),
        cout_(cout),
        rows_(rows),
        places_(places),
        add_(add),
        pixels_side_by_side_(out.stride_x == 1 && out.stride_c != 1),
        parts_(pixels_side_by_side_ ? 2 : rows) {}

  // Takes the sums of a panel of a group, whose tiles start at these places, to be written in `steps` steps.
  void take(const float* sums, int64_t panel, const int64_t* starts, int64_t tiles, int64_t steps) {
    sums_ = sums;
    panel_ = panel;
    for (int64_t i = 0; i < tiles; ++i) starts_[i] = starts[i];
    tiles_ = tiles;
    tile_ = part_ = 0;
    share_ = (tiles * parts_ + steps - 1) / steps;
  }

  void step() { write(share_); }
  void finish() { write(tiles_ * parts_); }

 private:
  void write(int64_t jobs) {
    while (jobs > 0 && tile_ < tiles_) {
      const int64_t some = std::min(jobs, parts_ - part_);
      if (pixels_side_by_side_) {
        for (int64_t half = part_; half < part_ + some; ++half) write_half_tile(tile_, half);
      } else {
        write_rows(tile_, part_, some);
      }
      jobs -= some;
      part_ += some;
      if (part_ < parts_) continue;
      part_ = 0;
      ++tile_;
    }
  }

  // The panel's channels of some pixels.  The loads of the tiles leave few to spare: what is the same for all the pixels
  // is held in registers.
  void write_rows(int64_t tile, int64_t row, int64_t count) {
    const int64_t first = starts_[tile] + row, channel = panel_ * panel_channels;
    const int64_t* places = places_ + first;
    const float* sums = sums_ + (tile * tile_pixels + row) * panel_channels;
    uint16_t* const to = map_ + channel;
    const __mmask32 exist = first_halves(cout_ - channel);
    const auto low = add_.channels(channel), high = add_.channels(channel + 16);
    for (int64_t i = 0; i < count; ++i, sums += panel_channels) {
      if (places[i] < 0) continue;
      const __m512i line = rounded(low(_mm512_loadu_ps(sums), first + i), high(_mm512_loadu_ps(sums + 16), first + i));
      _mm512_mask_storeu_epi16(to + places[i], exist, line);
    }
  }

  // Sixteen channels of a tile, lines of which are transposed to lines of pixels.
  void write_half_tile(int64_t tile, int64_t half) {
    const int64_t channel = panel_ * panel_channels + 16 * half;
    const int64_t channels = cout_ - channel < 16 ? cout_ - channel : 16;
    if (channels <= 0) return;
    const float* sums = sums_ + tile * tile_pixels * panel_channels + 16 * half;
    const int64_t* places = places_ + starts_[tile];
    const auto finished = add_.channels(channel);
    Register lines[16];
    for (int64_t i = 0; i < tile_pixels; ++i, sums += panel_channels) {
      const bool exists = i < rows_ && places[i] >= 0;
      lines[i] = exists ? _mm512_castps_si512(finished(_mm512_loadu_ps(sums), starts_[tile] + i)) : _mm512_setzero_si512();
    }
    transpose_registers<4>(lines);
    for (int64_t i = 0; i < rows_;) {
      if (places[i] < 0) {
        ++i;
        continue;
      }
      const int64_t first = i;
      for (++i; i < rows_ && places[i] == places[i - 1] + 1;) ++i;
      const __mmask16 exist = static_cast<__mmask16>(((1u << i) - 1) & ~((1u << first) - 1));
      uint16_t* to = map_ + places[first] - first + channel * out_.stride_c;
      for (int64_t c = 0; c < channels; ++c, to += out_.stride_c) {
        const __m256bh line = _mm512_cvtneps_pbh(_mm512_castsi512_ps(lines[c]));
        _mm256_mask_storeu_epi16(to, exist, reinterpret_cast<__m256i>(line));
      }
    }
  }

  const fpn::Result out_;
  uint16_t* const map_;
  const int64_t cout_, rows_;
  const Places places_;
  const Add add_;
  const bool pixels_side_by_side_;
  const int64_t parts_;  // of a tile, each a job

  const float* sums_ = nullptr;
  int64_t panel_ = 0, starts_[group_tiles] = {}, tiles_ = 0;
  int64_t tile_ = 0, part_ = 0, share_ = 0;  // the next job, and jobs a step
};

}  // namespace
