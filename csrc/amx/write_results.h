// Adds the bias and the top to the sums of a group of tiles, rounds once, and stores pixels in either layout.
//
// The work is split into small jobs between the products of the next group, so that the tile unit does not wait: the
// 3x3 convolution of C3 (256 channels, one core of an Intel Xeon with AMX) took 12.5 ms with the jobs after the
// products, 9.6 ms for the products only.
#pragma once

#include <algorithm>

#include "../simd/transposes.h"
#include "tile_product.h"

namespace {

// Flushes denormal numbers to zero, like the products.
inline __m512i rounded(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Offsets of the block's pixels in the result, by their index in scratch memory; negative: no such pixel.
using Offsets = const int64_t*;

// add.channels(channel) returns a function (sums, index) -> results for sixteen channels of the pixel with this index.
template <class Add>
class Writer {
 public:
  Writer(const fpn::Result& out, int64_t n, int64_t cout, int64_t rows, Offsets offsets, const Add& add)
      : out_(out),
        map_(static_cast<uint16_t*>(out.data) + n * out.stride_n),
        cout_(cout),
        rows_(rows),
        offsets_(offsets),
        add_(add),
        nchw_(out.stride_x == 1 && out.stride_c != 1),
        parts_(nchw_ ? 2 : rows) {}

  // Starts writing the sums of one panel of a group, in `steps` steps.  starts: the index of each tile's first pixel.
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
      if (nchw_) {
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

  // The panel's channels of `count` pixels.  The tiles use most of the load bandwidth, so constants stay in registers.
  void write_rows(int64_t tile, int64_t row, int64_t count) {
    const int64_t first = starts_[tile] + row, channel = panel_ * panel_channels;
    const int64_t* offsets = offsets_ + first;
    const float* sums = sums_ + (tile * tile_pixels + row) * panel_channels;
    uint16_t* const to = map_ + channel;
    const __mmask32 exist = first_halves(cout_ - channel);
    const auto low = add_.channels(channel), high = add_.channels(channel + 16);
    for (int64_t i = 0; i < count; ++i, sums += panel_channels) {
      if (offsets[i] < 0) continue;
      const __m512i line = rounded(low(_mm512_loadu_ps(sums), first + i), high(_mm512_loadu_ps(sums + 16), first + i));
      _mm512_mask_storeu_epi16(to + offsets[i], exist, line);
    }
  }

  // Sixteen channels of a tile, transposed to lines of pixels.
  void write_half_tile(int64_t tile, int64_t half) {
    const int64_t channel = panel_ * panel_channels + 16 * half;
    const int64_t channels = cout_ - channel < 16 ? cout_ - channel : 16;
    if (channels <= 0) return;
    const float* sums = sums_ + tile * tile_pixels * panel_channels + 16 * half;
    const int64_t* offsets = offsets_ + starts_[tile];
    const auto finished = add_.channels(channel);
    Register lines[16];
    for (int64_t i = 0; i < tile_pixels; ++i, sums += panel_channels) {
      const bool exists = i < rows_ && offsets[i] >= 0;
      lines[i] = exists ? _mm512_castps_si512(finished(_mm512_loadu_ps(sums), starts_[tile] + i))
                        : _mm512_setzero_si512();
    }
    transpose_registers<4>(lines);
    for (int64_t i = 0; i < rows_;) {
      if (offsets[i] < 0) {
        ++i;
        continue;
      }
      const int64_t first = i;
      for (++i; i < rows_ && offsets[i] == offsets[i - 1] + 1;) ++i;
      const __mmask16 exist = static_cast<__mmask16>(((1u << i) - 1) & ~((1u << first) - 1));
      uint16_t* to = map_ + offsets[first] - first + channel * out_.stride_c;
      for (int64_t c = 0; c < channels; ++c, to += out_.stride_c) {
        const __m256bh line = _mm512_cvtneps_pbh(_mm512_castsi512_ps(lines[c]));
        _mm256_mask_storeu_epi16(to, exist, reinterpret_cast<__m256i>(line));
      }
    }
  }

  const fpn::Result out_;
  uint16_t* const map_;
  const int64_t cout_, rows_;
  const Offsets offsets_;
  const Add add_;
  const bool nchw_;
  const int64_t parts_;  // jobs per tile

  const float* sums_ = nullptr;
  int64_t panel_ = 0, starts_[group_tiles] = {}, tiles_ = 0;
  int64_t tile_ = 0, part_ = 0, share_ = 0;  // the next job, and jobs per step
};

}  // namespace
