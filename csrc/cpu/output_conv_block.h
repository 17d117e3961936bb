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
#include "product_vectors.h"

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

}  // namespace
