// What the drivers (compiled once, for any CPU) hand to the kernels (compiled once a level; see capability.h).
//
// Plain structures only: a kernel allocates nothing, checks nothing and knows no tensor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/maps.h"

namespace fpn::cpu {

using fpn::Dtype;
using fpn::Map;
using fpn::Result;

// The pixels that each fine pixel reads along one axis.
struct ForwardAxis {
  const int32_t* lower;
  const int32_t* upper;    // null in the nearest modes
  const float* weight;     // of `upper`, for maps of up to 32 bits
  const double* weight64;  // the same for float64 maps
  bool doubled;            // lower[i] == i / 2, and nothing else is read
};

// The fine pixels that each coarse pixel was read by: begin[s] .. begin[s] + count[s].
struct AdjointAxis {
  const int32_t* begin;
  const int32_t* count;
  int64_t longest;         // the largest count
  // Term by term, [longest][coarse size]: the k-th fine pixel of each coarse one and its weight, zero beyond the count.
  const int32_t* index;
  const float* weight;
  const double* weight64;
  // Fine pixels by the lower pixel that they read: each belongs to one coarse pixel.
  const int32_t* own_begin;
  const int32_t* own_count;
  bool doubled;            // begin[s] == 2 s, count[s] == 2, weights 1
};

// out = gain * (lateral + resize(top))
struct UpsampleAdd {
  Dtype dtype;
  Map top, lateral;
  Result out;
  int64_t channels;
  ForwardAxis rows, columns;
  double gain;
  bool bilinear;
  bool channels_last;
  bool streaming;  // the result is too large for the caches
};

// A map of a weighted merge.
struct WeightedMap {
  Map map;
  bool resized;
  ForwardAxis rows, columns;  // where it is resized
  double factor;
};

// out = sum of factor * resize(map)
struct WeightedMerge {
  Dtype dtype;
  WeightedMap inputs[3];
  int64_t count;  // of inputs: 2 or 3; the first is never resized
  Result out;
  int64_t channels, height, width;
  bool bilinear;
  bool channels_last;
  bool streaming;  // the result is too large for the caches
};

// grad_input = factor * grad; also the sums of grad * input, in float64.
struct WeightedMergeBackward {
  Dtype dtype;
  Map grad, input;
  Result grad_input;
  int64_t channels;
  double factor;
  bool channels_last;
  bool streaming;  // grad_input is too large for the caches
  double* sums;  // one for each unit
};

// grad_top = own + gain * adjoint of the resize; where bias_sums is given, also the sums of grad, in float64.
struct UpsampleAddBackward {
  Dtype dtype;
  Map grad;
  Result grad_top;
  const void* own;  // with the strides of grad_top; or null
  int64_t channels, top_height, top_width;
  AdjointAxis rows, columns;
  double gain;
  bool bilinear;
  bool channels_last;
  double* bias_sums;  // a line of sums for each unit: [units] in NCHW, [units][channels] in NHWC; or null
};

// A map copied into another layout.
struct Reorder {
  int64_t element;        // bytes
  Map source;
  Result out;
  int64_t channels;
  int64_t lines, length;  // of evenly spaced pixels in `source`: one line a map, or one a row
  int64_t block, blocks;  // pixels in a block, blocks in a line
  bool streaming;         // the result is too large for the caches
};

// out = gain * (weight x feature + bias + resize(top)), through lateral_connection_tiles.inc.
struct LateralConnection {
  Dtype dtype;
  Map feature;          // channels (feature_channels_last) or pixels side by side; the pixels of a map evenly spaced
  Map top;              // data null: none
  Result out;
  const void* weight_from;  // [cout, cin]
  int64_t weight_row_stride, weight_column_stride;
  void* weight;         // room for it as the tiles read it: see pack_weight
  const float* bias;    // [cout]
  int64_t cin, cout, height, width;
  int64_t operands;     // channels, or pairs of them
  int64_t weight_line;  // operands from one row of the packed weight, or panel of them, to the next
  int64_t block, blocks;  // pixels in a block, blocks in a map
  ForwardAxis rows, columns;
  double gain;
  bool bilinear;
  bool channels_last;   // the result
  bool feature_channels_last;
};

// out = 3x3 convolution of feature (stride 1, padding 1) + bias, by Winograd's F(2x2, 3x3): see output_conv_block.h.
struct OutputConv {
  Dtype dtype;
  Map feature;              // any strides; channels (feature_channels_last) or else pixels read as vectors
  Result out;
  const void* weight_from;  // [cout, cin, 3, 3]
  int64_t weight_strides[4];
  const void* bias_from;    // [cout], or null
  int64_t bias_stride;
  float* weight;            // room for it transformed: [panel][16][cin][panel_columns]
  float* bias;              // room for it: [panels * panel_columns]
  int64_t batch, cin, cout;
  int64_t tiles_down, tiles_across;  // of 2x2 results, in a map
  int64_t tiles;            // in all maps
  int64_t block;            // tiles in a block
  bool feature_channels_last;
  bool channels_last;       // the result
};

// The gradient of its weight, and of its bias: see output_conv_backward_weight_floats.cpp.
struct OutputConvBackwardWeight {
  OutputConv conv;        // dtype, feature, sizes and tiles
  Map grad;               // as the feature, its channels side by side
  Result out;             // [cout, cin, 3, 3]
  double* bias_sums;      // [cout], or null
  uint8_t* finite;        // of each unit, whether its sums are
  int64_t part_out, part_in;    // output and input channels of a unit
  int64_t parts_out, parts_in;
  int64_t block;          // tiles transformed at a time
  int64_t grad_plane, input_plane;  // floats from one transformed element to the next
  int64_t input_at, sums_at, bias_at, zeros_at, scratch_bytes;
};

// What the AMX kernels and their drivers agree on: see amx.h.
constexpr int64_t amx_tile_pixels = 16;
constexpr int64_t amx_tile_channels = 32;
constexpr int64_t amx_pixel_bytes = 64;
constexpr int64_t amx_panel_channels = 32;
constexpr int64_t amx_panel_bytes = 2048;
constexpr int64_t amx_sums_bytes = 3 * amx_tile_pixels * amx_panel_channels * 4;  // of a group of tiles; there are two such

// A bfloat16 weight [cout, cin, taps], and room for it as the tiles read it.
struct AmxWeight {
  const void* from;
  int64_t stride_out, stride_in, stride_y, stride_x;
  int64_t cout, cin, taps;
  int64_t chunks, panels;  // of 32 input and 32 output channels
  std::byte* packed;
};

// out = 3x3 convolution of feature (stride 1, padding 1) + bias: see output_conv_amx.cpp.
struct AmxOutputConv {
  Map feature;
  Result out;
  AmxWeight weight;
  const float* bias;  // room for whole panels
  int64_t batch;
  int64_t blocks_down, blocks_across;
  int64_t tiles_across;   // of a row of the map
  int64_t rows;           // pixels of a tile
  bool flat;              // the tiles go on from row to row
  int64_t parts;          // that a block's output channels are computed in
  int64_t pitch, plane;   // scratch memory: pixels from row to row, bytes from 32 channels to the next
  int64_t sums_at, places_at, scratch_bytes;
};

// The gradient of the 3x3 convolution's weight: see output_conv_backward_weight_amx.cpp.
//
// The pixels of all maps are one line of positions: a zero after each row, a row of zeros after each map.
struct AmxOutputConvBackwardWeight {
  Map grad, feature;
  Result out;             // bfloat16 [cout, cin, 3, 3]
  double* bias_sums;      // [cout], or null
  uint8_t* finite;        // of each unit, whether its sums are
  int64_t batch, cout, cin;
  int64_t panels, chunks;  // of 32 output and 32 input channels
  int64_t parts_out, parts_in;  // that they are taken in: a unit is one of each
  int64_t pitch;          // positions from row to row
  int64_t steps, blocks;  // of 32 positions, and blocks of such steps
  int64_t most_steps;     // of a block
  int64_t halo;           // steps before and after a block, of the feature alone
  int64_t window_bytes;   // of sixteen channels of the feature, a block and its halo
  int64_t left_at, right_at, sums_at, lines_at, pixels_at, zeros_at, scratch_bytes;
};

// What a pixel reads of the top.
constexpr int64_t amx_top_place_bytes = 40;

// A lateral connection of bfloat16 maps: see lateral_connection_amx.cpp.
struct AmxLateralConnection {
  LateralConnection call;
  AmxWeight weight;
  int64_t plane;  // scratch memory: bytes from 32 channels to the next
  int64_t sums_at, places_at, top_places_at, scratch_bytes;
  bool in_place;  // whole tiles of the feature are read where they are
  bool fetches;   // the maps are too large for the caches
};

// Blocks of pixels are whole tiles: a multiple of the rows that any level has in registers.
constexpr int64_t tile_rows = 12;
// Columns of a matrix that lie together, row by row.
constexpr int64_t panel_columns = 32;
// Operands added up in registers at a time: a panel's share stays in the first cache, and shorter chains of sums
// round less.
constexpr int64_t chunk = 128;

// Units are rows of the result: (n * C + c) * height + y in NCHW, n * height + y in NHWC.
using UpsampleAddRows = void (*)(const UpsampleAdd&, int64_t begin, int64_t end, std::byte* scratch);
using UpsampleAddBackwardRows = void (*)(const UpsampleAddBackward&, int64_t begin, int64_t end, std::byte* scratch);

// Every line in scratch memory starts on a cache line.
inline constexpr int64_t line_bytes(int64_t count, int64_t element) { return (count * element + 63) / 64 * 64; }

// What ResizedRows (rows.h) takes: two resized lines, and two as they come.
inline constexpr int64_t held_rows_bytes(int64_t width, int64_t top_width) {
  return 2 * line_bytes(width, 8) + 2 * line_bytes(top_width, 8);
}

#define FPN_DECLARE_KERNELS(level)                                                                                 \
  namespace level {                                                                                                \
  void upsample_add_rows(const UpsampleAdd&, int64_t begin, int64_t end, std::byte* scratch);                      \
  void upsample_add_backward_rows(const UpsampleAddBackward&, int64_t begin, int64_t end, std::byte* scratch);     \
  void weighted_merge_rows(const WeightedMerge&, int64_t begin, int64_t end, std::byte* scratch);                  \
  void weighted_merge_backward_rows(const WeightedMergeBackward&, int64_t begin, int64_t end, std::byte* scratch); \
  void reorder_blocks(const Reorder&, int64_t begin, int64_t end, std::byte* scratch);                             \
  }

FPN_DECLARE_KERNELS(portable)
FPN_DECLARE_KERNELS(avx2)
FPN_DECLARE_KERNELS(avx512)

// Matrix products: of floats (float32 maps, and maps of 16 bits widened), and of pairs of bfloat16.
#define FPN_DECLARE_PRODUCTS(level)                                                                        \
  namespace level {                                                                                        \
  void lateral_connection_weight(const LateralConnection&, int64_t begin, int64_t end, std::byte* scratch); \
  void lateral_connection_blocks(const LateralConnection&, int64_t begin, int64_t end, std::byte* scratch); \
  void output_conv_weight(const OutputConv&, int64_t begin, int64_t end, std::byte* scratch);               \
  void output_conv_blocks(const OutputConv&, int64_t begin, int64_t end, std::byte* scratch);               \
  void output_conv_backward_weight_parts(                                                                   \
      const OutputConvBackwardWeight&, int64_t begin, int64_t end, std::byte* scratch);                     \
  }

FPN_DECLARE_PRODUCTS(avx2)
FPN_DECLARE_PRODUCTS(avx512)

namespace avx512bf16 {
void lateral_connection_weight(const LateralConnection&, int64_t begin, int64_t end, std::byte* scratch);
void lateral_connection_blocks(const LateralConnection&, int64_t begin, int64_t end, std::byte* scratch);
}  // namespace avx512bf16
namespace amx {
void pack_weight(const AmxWeight&, int64_t begin, int64_t end, std::byte* scratch);
void output_conv_blocks(const AmxOutputConv&, int64_t begin, int64_t end, std::byte* scratch);
void output_conv_backward_weight_parts(const AmxOutputConvBackwardWeight&, int64_t begin, int64_t end, std::byte* scratch);
void lateral_connection_blocks(const AmxLateralConnection&, int64_t begin, int64_t end, std::byte* scratch);
}  // namespace amx

#undef FPN_DECLARE_KERNELS
#undef FPN_DECLARE_PRODUCTS

}  // namespace fpn::cpu
