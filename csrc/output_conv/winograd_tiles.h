// A block of tiles of the 3x3 convolution by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, arXiv 1509.09308).
//
// A tile is 2x2 results, which read 4x4 pixels d.  For the 3x3 weight g of an input and an output channel,
//     Y = A^T [ sum over input channels of (G g G^T) * (B^T d B) ] A,
// where * is element by element: 16 products instead of 36.  For each of the 16 elements the sum over the input
// channels is a matrix product, [tiles, cin] x [cin, cout].
//
//     B^T = 1  0 -1  0     G = 1    0    0       A^T = 1  1  1  0
//           0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
//           0 -1  1  0         1/2 -1/2  1/2
//           0  1  0 -1         0    0    1
#pragma once

#include <cstdint>

#include "../simd/fma.h"
#include "winograd_kernel.h"

namespace {

using fpn::cpu::Map;
using fpn::cpu::OutputConv;

constexpr int64_t panel_columns = fpn::cpu::panel_columns;
constexpr int elements = fpn::cpu::transformed_elements;

// The transformed tiles of a block: element e of tile t and channel c at data[e * plane + t * tile + c * channel].
struct TransformedInput {
  float* data;
  int64_t plane, tile, channel;
};

// The sums for a panel of output channels: element e of tile t at data[e * plane + t * panel_columns].
struct Sums {
  float* data;
  int64_t plane;
};

// Neighbouring tiles in one row of tiles of a map; `at` is the index of the first tile in the block.
struct Run {
  int64_t n, row, column, at, count;
};

// Splits the tiles first .. first + count, numbered across the rows of all maps, into runs.
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
