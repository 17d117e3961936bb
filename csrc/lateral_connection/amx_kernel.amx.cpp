// The 1x1 convolution of bfloat16 maps, its bias and the merge, as a matrix product by AMX tiles.
//
// A block is a run of pixels across the rows of a map, copied to scratch memory in the layout of the tiles.  A group of
// tiles stays in L1 while the whole weight is streamed.

#include "amx_kernel.h"

#include <algorithm>
#include <utility>

#include "../amx/copy_pixels.h"
#include "../amx/prefetcher.h"
#include "../amx/write_results.h"

namespace {

using fpn::cpu::AmxLateralConnection;
using fpn::cpu::LateralConnection;

// The four elements of the top that a pixel reads, as offsets, and the weights of the lower row and the right column.
struct TopOffsets {
  int64_t above_left, above_right, below_left, below_right;
  float below, right;
};
static_assert(sizeof(TopOffsets) == fpn::cpu::amx_top_offsets_bytes);

enum class Top { none, nearest, bilinear };

// gain * (sums + bias + top), with the top in NHWC.
template <Top kind>
struct AddTop {
  const LateralConnection& call;
  const BFloat16* top;     // of this map
  const int64_t* nearest;  // offset per pixel
  const TopOffsets* bilinear;

  static __m512 read(const BFloat16* from, __mmask16 exist) {
    const __m256i bits = _mm256_maskz_loadu_epi16(exist, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  auto channels(int64_t channel) const {
    const __mmask16 exist = static_cast<__mmask16>(first_halves(call.cout - channel));
    const __m512 bias = _mm512_loadu_ps(call.bias + channel), gain = _mm512_set1_ps(static_cast<float>(call.gain));
    const BFloat16* from = top + channel;
    if constexpr (kind == Top::none) {
      return [=](__m512 sums, int64_t) { return _mm512_add_ps(sums, bias); };
    } else if constexpr (kind == Top::nearest) {
      return [=, offsets = nearest](__m512 sums, int64_t index) {
        const __m512 merged = _mm512_add_ps(_mm512_add_ps(sums, bias), read(from + offsets[index], exist));
        return _mm512_mul_ps(merged, gain);
      };
    } else {
      return [=, offsets = bilinear](__m512 sums, int64_t index) {
        const TopOffsets& at = offsets[index];
        const __m512 right = _mm512_set1_ps(at.right), left = _mm512_set1_ps(1 - at.right);
        const auto line = [&](int64_t first, int64_t second) {
          const __m512 west = _mm512_mul_ps(left, read(from + first, exist));
          return _mm512_add_ps(west, _mm512_mul_ps(right, read(from + second, exist)));
        };
        const __m512 above = _mm512_mul_ps(_mm512_set1_ps(1 - at.below), line(at.above_left, at.above_right));
        const __m512 below = _mm512_mul_ps(_mm512_set1_ps(at.below), line(at.below_left, at.below_right));
        return _mm512_mul_ps(_mm512_add_ps(_mm512_add_ps(sums, bias), _mm512_add_ps(above, below)), gain);
      };
    }
  }
};

struct PixelBlock {
  int64_t n, first, count;
};

// Whether the tiles are read without a copy: only whole tiles, and see may_read_in_place in amx_driver.cpp.
inline bool reads_in_place(const AmxLateralConnection& all, const PixelBlock& block) {
  return all.in_place && block.count % tile_pixels == 0;
}

void copy_block(const AmxLateralConnection& all, const PixelBlock& block, std::byte* to) {
  const fpn::Map& map = all.call.feature;
  const uint16_t* from = static_cast<const uint16_t*>(map.data) + block.n * map.stride_n;
  if (reads_in_place(all, block)) return;
  const bool one_line = map.height == 1 || map.stride_y == map.width * map.stride_x;
  if (one_line) return copy_pixels(map, from + block.first * map.stride_x, all.call.cin, block.count, to, all.plane);
  for (int64_t at = 0; at < block.count;) {
    const int64_t y = (block.first + at) / map.width, x = (block.first + at) % map.width;
    const int64_t count = std::min(map.width - x, block.count - at);
    copy_pixels(
        map, from + y * map.stride_y + x * map.stride_x, all.call.cin, count, to + at * pixel_bytes, all.plane);
    at += count;
  }
}

// The pixels' offsets in the result.
void find_offsets(const LateralConnection& call, const PixelBlock& block, int64_t* offsets) {
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t y = (block.first + i) / call.width, x = (block.first + i) % call.width;
    offsets[i] = y * call.out.stride_y + x * call.out.stride_x;
  }
  for (int64_t i = 0; i < tile_pixels; ++i) offsets[block.count + i] = -1;
}

// The offsets of a pixel's elements of the top.
inline void read_offset(const LateralConnection& call, int64_t y, int64_t x, int64_t& offset) {
  offset = call.rows.lower[y] * call.top.stride_y + call.columns.lower[x] * call.top.stride_x;
}

inline void read_offset(const LateralConnection& call, int64_t y, int64_t x, TopOffsets& offsets) {
  const int64_t above = call.rows.lower[y] * call.top.stride_y, left = call.columns.lower[x] * call.top.stride_x;
  const int64_t below = call.rows.upper[y] * call.top.stride_y, right = call.columns.upper[x] * call.top.stride_x;
  offsets = {above + left, above + right, below + left, below + right, call.rows.weight[y], call.columns.weight[x]};
}

template <class Offset>
Offset* find_top_offsets(const AmxLateralConnection& all, const PixelBlock& block, std::byte* scratch) {
  Offset* offsets = reinterpret_cast<Offset*>(scratch + all.top_offsets_at);
  for (int64_t i = 0; i < block.count; ++i) {
    read_offset(all.call, (block.first + i) / all.call.width, (block.first + i) % all.call.width, offsets[i]);
  }
  return offsets;
}

// The memory of a block: one range of pixels, or one range per channel.
Area area_of(const fpn::Map& map, int64_t channels, const PixelBlock& block) {
  const auto* first = static_cast<const uint16_t*>(map.data) + block.n * map.stride_n + block.first * map.stride_x;
  if (map.stride_c == 1) return {first, 0, 1, block.count * channels * 2, false};
  return {first, map.stride_c * 2, channels, block.count * 2, false};
}

void prefetch_block(const AmxLateralConnection& all, const PixelBlock& block, Prefetcher& prefetcher) {
  const LateralConnection& call = all.call;
  prefetcher.add(area_of(call.feature, call.cin, block));
  if (call.out.stride_c != 1) {
    const auto* first = static_cast<const uint16_t*>(call.out.data) + block.n * call.out.stride_n + block.first;
    prefetcher.add({first, call.out.stride_c * 2, call.cout, block.count * 2, true});
  }
  if (call.top.data == nullptr) return;
  const int64_t last = block.first + block.count - 1;
  const int64_t above = call.rows.lower[block.first / call.width], below = call.rows.lower[last / call.width];
  const int64_t left = above == below ? call.columns.lower[block.first % call.width] : 0;
  const int64_t right = above == below ? call.columns.lower[last % call.width] : call.top.width - 1;
  const int64_t count = (below - above) * call.top.width + right - left + 1;
  prefetcher.add(area_of(call.top, call.cout, {block.n, above * call.top.width + left, count}));
}

template <class Add>
void multiply_block(
    const AmxLateralConnection& all,
    const PixelBlock& block,
    std::byte* scratch,
    const Add& add,
    Prefetcher& prefetcher) {
  float* sums = reinterpret_cast<float*>(scratch + all.sums_at);
  float* held = sums + group_tiles * tile_pixels * panel_channels;
  int64_t* offsets = reinterpret_cast<int64_t*>(scratch + all.offsets_at);
  find_offsets(all.call, block, offsets);
  const int64_t tap = 0, steps = std::max<int64_t>(1, all.weight.chunks);
  const bool in_place = reads_in_place(all, block);
  const Sum sum = in_place ? Sum{all.weight.chunks, pixel_bytes, all.call.feature.stride_x * 2, &tap, 1}
                           : Sum{all.weight.chunks, all.plane, pixel_bytes, &tap, 1};
  const std::byte* pixels = scratch;
  if (in_place) {
    pixels = static_cast<const std::byte*>(all.call.feature.data) +
        (block.n * all.call.feature.stride_n + block.first * all.call.feature.stride_x) * 2;
  }
  const int64_t tiles = (block.count + tile_pixels - 1) / tile_pixels, groups = (tiles + group_tiles - 1) / group_tiles;
  Writer writer(all.call.out, block.n, all.call.cout, tile_pixels, offsets, add);
  WriteAndPrefetch<Writer<Add>> meanwhile{writer, prefetcher};
  prefetcher.start(groups * all.weight.panels * steps);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = tiles * group / groups, count = tiles * (group + 1) / groups - begin;
    const std::byte* left[group_tiles] = {};
    int64_t starts[group_tiles] = {};
    for (int64_t i = 0; i < count; ++i) {
      starts[i] = (begin + i) * tile_pixels;
      left[i] = pixels + starts[i] * sum.pixel_stride;
    }
    for (int64_t panel = 0; panel < all.weight.panels; ++panel) {
      const std::byte* weight = all.weight.packed + panel * all.weight.chunks * panel_bytes;
      multiply(count, left, weight, sum, sums, meanwhile);
      writer.finish();
      writer.take(sums, panel, starts, count, steps);
      std::swap(sums, held);
    }
  }
  writer.finish();
}

void merge_block(const AmxLateralConnection& all, const PixelBlock& block, std::byte* scratch, Prefetcher& prefetcher) {
  const LateralConnection& call = all.call;
  copy_block(all, block, scratch);
  if (call.top.data == nullptr) {
    return multiply_block(all, block, scratch, AddTop<Top::none>{call, nullptr, nullptr, nullptr}, prefetcher);
  }
  const auto* top = static_cast<const BFloat16*>(call.top.data) + block.n * call.top.stride_n;
  if (call.bilinear) {
    const AddTop<Top::bilinear> add{call, top, nullptr, find_top_offsets<TopOffsets>(all, block, scratch)};
    return multiply_block(all, block, scratch, add, prefetcher);
  }
  const AddTop<Top::nearest> add{call, top, find_top_offsets<int64_t>(all, block, scratch), nullptr};
  multiply_block(all, block, scratch, add, prefetcher);
}

}  // namespace

namespace fpn::cpu::amx {

void lateral_connection_blocks(const AmxLateralConnection& all, int64_t begin, int64_t end, std::byte* scratch) {
  const TileRegisters registers(tile_pixels);
  const int64_t pixels = all.call.height * all.call.width, blocks = all.call.blocks;
  const auto block = [&](int64_t unit) {
    const int64_t first = unit % blocks * all.call.block;
    return PixelBlock{unit / blocks, first, std::min(all.call.block, pixels - first)};
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    Prefetcher prefetcher;
    if (all.fetches && unit + 1 < end) prefetch_block(all, block(unit + 1), prefetcher);
    merge_block(all, block(unit), scratch, prefetcher);
  }
}

}  // namespace fpn::cpu::amx
