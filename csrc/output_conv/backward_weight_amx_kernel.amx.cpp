// The gradients of the 3x3 weight and of the bias for bfloat16 maps, by AMX tiles:
//
//   grad_weight[o, i, tap] = sum over pixels p of grad[p, o] * feature[p + offset of the tap, i].
//
// The sum runs over positions (backward_weight_amx_kernel.h): a tap is a constant offset, and values beyond an edge are
// zero.  A unit is a part of the output channels by a part of the input channels, over all positions.  Units have
// separate sums, so the result does not depend on the number of threads.  Per block of positions, both operands are
// copied to scratch memory and their products are added to the sums, which stay there in float32.
//
// Six accumulators: three taps of a row by two tiles of output channels, with seven loads per six products.  The left
// operand of a panel stays in L1, the right operand is streamed.
//
// The zeros are multiplied as well, and zero times infinity is NaN.  Each value is in a product of the middle tap, so
// finite sums prove that all values are finite; otherwise the call is left to PyTorch.

#include "backward_weight_amx_kernel.h"

#include "backward_weight_amx_operands.h"
#include "backward_weight_amx_results.h"

namespace {

using fpn::cpu::AmxOutputConvBackwardWeight;

constexpr int64_t group_taps = 3;
constexpr int64_t group_floats = group_taps * 2 * 256;  // sums of a group: [tap][tile of output channels][16][16]

// Adds `steps` products to a group of sums, or sets them if are_first.
template <bool both>
inline void multiply_taps(
    const std::byte* left,
    int64_t next,
    const std::byte* const (&right)[group_taps],
    int64_t steps,
    float* sums,
    bool are_first) {
  constexpr int64_t tile = 256;
  // Prefetches the next group's sums into L1.
  const float* ahead = sums + group_floats;
  const int64_t lines = (group_floats / 16 + steps - 1) / steps;
  order_memory();
  if (are_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if constexpr (both) {
      _tile_zero(3);
      _tile_zero(4);
      _tile_zero(5);
    }
  } else {
    _tile_loadd(0, sums, pixel_bytes);
    _tile_loadd(1, sums + 2 * tile, pixel_bytes);
    _tile_loadd(2, sums + 4 * tile, pixel_bytes);
    if constexpr (both) {
      _tile_loadd(3, sums + tile, pixel_bytes);
      _tile_loadd(4, sums + 3 * tile, pixel_bytes);
      _tile_loadd(5, sums + 5 * tile, pixel_bytes);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step * tile_bytes;
    _tile_loadd(6, left + at, pixel_bytes);
    _tile_loadd(7, right[0] + at, pixel_bytes);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (both) {
      _tile_loadd(6, left + next + at, pixel_bytes);
      _tile_dpbf16ps(3, 6, 7);
    }
    _tile_loadd(7, right[1] + at, pixel_bytes);
    if constexpr (both) {
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, left + at, pixel_bytes);
    }
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(7, right[2] + at, pixel_bytes);
    _tile_dpbf16ps(2, 6, 7);
    if constexpr (both) {
      _tile_loadd(6, left + next + at, pixel_bytes);
      _tile_dpbf16ps(5, 6, 7);
    }
    for (int64_t i = 0; i < lines; ++i, ahead += 16) __builtin_prefetch(ahead, 1, 3);
  }
  _tile_stored(0, sums, pixel_bytes);
  _tile_stored(1, sums + 2 * tile, pixel_bytes);
  _tile_stored(2, sums + 4 * tile, pixel_bytes);
  if constexpr (both) {
    _tile_stored(3, sums + tile, pixel_bytes);
    _tile_stored(4, sums + 3 * tile, pixel_bytes);
    _tile_stored(5, sums + 5 * tile, pixel_bytes);
  }
  order_memory();
}

// Adds sixteen channels of grad over `steps` steps: products with a tile of ones.
inline void add_channels(const std::byte* left, int64_t steps, const uint16_t* ones, int64_t channels, double* to) {
  alignas(64) float sums[16][16];
  order_memory();
  _tile_zero(0);
  _tile_loadd(7, ones, pixel_bytes);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, left + step * tile_bytes, pixel_bytes);
    _tile_dpbf16ps(0, 6, 7);
  }
  _tile_stored(0, sums, pixel_bytes);
  order_memory();
  for (int64_t i = 0; i < channels; ++i) to[i] += static_cast<double>(sums[i][0]);
}

// A unit's output and input channels, and its scratch memory.
struct Share {
  Positions grad, feature;
  int64_t tiles_out, tiles_in;  // of sixteen channels
  std::byte *left, *right;
  float* sums;
  uint16_t* lines;
  const uint16_t** pixels;
  uint16_t* zeros;
};

inline Positions some_channels(
    const AmxOutputConvBackwardWeight& call, const fpn::Map& map, int64_t all, int64_t index, int64_t parts) {
  const int64_t wholes = (all + tile_channels - 1) / tile_channels, first = wholes * index / parts * tile_channels;
  const int64_t end = std::min(all, wholes * (index + 1) / parts * tile_channels);
  return {map, call.batch, call.pitch, first, end - first};
}

inline Share share_of(const AmxOutputConvBackwardWeight& call, int64_t unit, std::byte* scratch) {
  Share share{};
  share.grad = some_channels(call, call.grad, call.cout, unit / call.parts_in, call.parts_out);
  share.feature = some_channels(call, call.feature, call.cin, unit % call.parts_in, call.parts_in);
  share.tiles_out = (share.grad.channels + 15) / 16;
  share.tiles_in = (share.feature.channels + tile_channels - 1) / tile_channels * 2;
  share.left = scratch + call.left_at;
  share.right = scratch + call.right_at;
  share.sums = reinterpret_cast<float*>(scratch + call.sums_at);
  share.lines = reinterpret_cast<uint16_t*>(scratch + call.lines_at);
  share.pixels = reinterpret_cast<const uint16_t**>(scratch + call.pixels_at);
  share.zeros = reinterpret_cast<uint16_t*>(scratch + call.zeros_at);
  return share;
}

// [panel][sixteen input channels][tap][tile of output channels][16][16]
inline float* sums_of(const Share& share, int64_t tile_out, int64_t tile_in) {
  return share.sums + (tile_out / 2 * share.tiles_in + tile_in) * taps * 2 * 256;
}

inline Source source_of(const Share& share, const Positions& from, int64_t step, int64_t steps) {
  return {from, step * step_positions, steps, share.zeros, share.pixels, share.lines};
}

// Moves the window by `by` steps: copies the halo that the next block shares to its beginning.
void move_window(const AmxOutputConvBackwardWeight& call, const Share& share, int64_t by) {
  for (int64_t tile = 0; tile < 2 * share.tiles_in; ++tile) {
    std::byte* window = share.right + tile * call.window_bytes;
    std::memmove(window, window + by * tile_bytes, static_cast<size_t>(2 * call.halo * tile_bytes));
  }
}

void multiply_block(const AmxOutputConvBackwardWeight& call, const Share& share, int64_t steps, bool is_first) {
  const int64_t next = call.max_steps * tile_bytes, odd = share.tiles_in * call.window_bytes;
  for (int64_t out = 0; out < share.tiles_out; out += 2) {
    const std::byte* left = share.left + out * next;
    for (int64_t in = 0; in < share.tiles_in; ++in) {
      const std::byte* window = share.right + in * call.window_bytes;
      float* sums = sums_of(share, out, in);
      for (int64_t dy = -1; dy <= 1; ++dy, sums += group_floats) {
        const std::byte* right[group_taps];
        for (int64_t dx = -1; dx <= 1; ++dx) {
          // Pairs of the even copy begin with the positions 2k, of the odd one with 2k - 1.
          const int64_t position = call.halo * step_positions + dy * call.pitch + dx;
          right[dx + 1] = window + (position + 1) / 2 * pixel_bytes + (position % 2 != 0 ? odd : 0);
        }
        if (out + 1 < share.tiles_out) {
          multiply_taps<true>(left, next, right, steps, sums, is_first);
        } else {
          multiply_taps<false>(left, next, right, steps, sums, is_first);
        }
      }
    }
  }
}

bool write(const AmxOutputConvBackwardWeight& call, const Share& share) {
  const TapsOfChannels order;
  const fpn::Result& out = call.out;
  const bool by_channel = out.stride_x == 1;
  for (int64_t o = 0; o < share.grad.channels; ++o) {
    uint16_t* row = static_cast<uint16_t*>(out.data) + (share.grad.first_channel + o) * out.stride_n;
    for (int64_t in = 0; in < share.tiles_in; in += 2) {
      const int64_t tile = o / 16, channel = share.feature.first_channel + in * 16;
      const int64_t channels = std::min(call.cin - channel, tile_channels);
      const float* first = sums_of(share, tile, in) + (tile % 2 * 16 + o % 16) * 16;
      const float* second = sums_of(share, tile, in + 1) + (tile % 2 * 16 + o % 16) * 16;
      __m512i lines[taps];
      for (int64_t tap = 0; tap < taps; ++tap, first += 512, second += 512) {
        if (!all_finite(first, 16) || !all_finite(second, 16)) return false;
        lines[tap] = rounded_line(first, second);
        if (by_channel) continue;
        uint16_t* to = row + tap / 3 * out.stride_y + tap % 3 * out.stride_x + channel;
        _mm512_mask_storeu_epi16(to, first_halves(channels), lines[tap]);
      }
      if (by_channel) order.store(lines, channels, row + channel * taps);
    }
  }
  return true;
}

// Sums all products of a unit, and grad itself unless bias_sums is null.
void add_up(const AmxOutputConvBackwardWeight& call, const Share& share, double* bias_sums) {
  alignas(64) uint16_t ones[512];
  std::fill(ones, ones + 512, uint16_t{0x3f80});
  const int64_t left_next = call.max_steps * tile_bytes, odd = share.tiles_in * call.window_bytes;
  const auto pack_feature = [&](int64_t step, int64_t steps, int64_t to) {
    pack_right(source_of(share, share.feature, step, steps), share.right + to * tile_bytes, call.window_bytes, odd);
  };
  pack_feature(-call.halo, 2 * call.halo, 0);
  for (int64_t block = 0; block < call.blocks; ++block) {
    const int64_t step = call.steps * block / call.blocks, steps = call.steps * (block + 1) / call.blocks - step;
    pack_feature(step + call.halo, steps, 2 * call.halo);
    pack_left(source_of(share, share.grad, step, steps), share.left, left_next);
    multiply_block(call, share, steps, block == 0);
    move_window(call, share, steps);
    if (bias_sums == nullptr) continue;
    for (int64_t tile = 0; tile < share.tiles_out; ++tile) {
      const int64_t channel = tile * 16, channels = std::min<int64_t>(16, share.grad.channels - channel);
      add_channels(share.left + tile * left_next, steps, ones, channels, bias_sums + channel);
    }
  }
}

}  // namespace

namespace fpn::cpu::amx {

void output_conv_backward_weight_parts(
    const AmxOutputConvBackwardWeight& call, int64_t begin, int64_t end, std::byte* scratch) {
  const TileRegisters registers(16);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Share share = share_of(call, unit, scratch);
    std::memset(share.zeros, 0, static_cast<size_t>(call.scratch_bytes - call.zeros_at));
    const bool sums_bias = call.bias_sums != nullptr && unit % call.parts_in == 0;
    add_up(call, share, sums_bias ? call.bias_sums + share.grad.first_channel : nullptr);
    call.finite[unit] = write(call, share) ? 1 : 0;
  }
}

}  // namespace fpn::cpu::amx
