// Sizes that the matrix products of vectors and their drivers share.
#pragma once

#include <cstdint>

namespace fpn::cpu {

// Rows of a register tile on AVX-512.  A block is a multiple of it, and so of the 6 rows on AVX2.
constexpr int64_t tile_rows = 12;
// Columns of a panel of the right operand; a panel is stored row by row.
constexpr int64_t panel_columns = 32;

}  // namespace fpn::cpu
