// A block of tiles of the 3x3 convolution by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, arXiv 1509.09308).
//
// A tile is 2x2 results, which read 4x4 pixels d.  With g the 3x3 weight of an input and an output channel,
//     Y = A^T [ sum over input channels of (G g G^T) * (B^T d B) ] A,
// where * is element by element: 16 products where the plain sum has 36.  For each of the 16 elements the sum over the
// input channels is a matrix product, [tiles, cin] x [cin, cout].
//
//     B^T = 1  0 -1  0     G = 1    0    0       A^T = 1  1  1  0
//           0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
//           0 -1  1  0         1/2 -1/2  1/2
//           0  1  0 -1         0    0    1
#pragma once

#include <cstdint>

#include "output_conv_scratch.h"
#include "vectors.h"

namespace {

using fpn::cpu::Map;
using fpn::cpu::OutputConv;

constexpr int64_t panel_columns = fpn::cpu::panel_columns;
constexpr int elements = fpn::cpu::transformed_elements;

// The tiles of a block, transformed: element e of tile t and channel c at input[e * plane + t * tile + c * channel].
struct TransformedInput {
  float* data;
  int64_t plane, tile, channel;
};

// The sums for a panel of output channels: element e of tile t at data[e * plane + t * panel_columns].
struct Sums {
  float* data;
  int64_t plane;
};

// Tiles side by side in a line of tiles of a map; `at` is the first one's place in the block.
struct Run {
  int64_t n, row, column, at, count;
};

// Splits the tiles first .. first + count, which are numbered across the lines of all maps, into runs.
template <class Step>
inline void over_runs(const OutputConv& call, int64_t first, int64_t count, Step&& step) {
  for (int64_t at = 0; at < count;) {
    const int64_t line = (first + at) / call.tiles_across, column = (first + at) % call.tiles_across;
    const int64_t left = call.tiles_across - column;
    const Run run{line / call.tiles_down, line % call.tiles_down, column, at, left < count - at ? left : count - at};
    step(run);
    at += run.count;
  }
}

// The first `count` of a vector's elements; none where it is negative.
inline __mmask16 first_elements(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : static_cast<__mmask16>((1u << count) - 1);
}

// Masked elements are zero, and their memory is not touched.
inline __m512 load_masked(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load_masked(const Half* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}
inline void store_masked(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store_masked(Half* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, to_half({value}));
}

inline float single(float value) { return value; }
inline float single(Half value) { return _cvtsh_ss(value.bits); }

}  // namespace
