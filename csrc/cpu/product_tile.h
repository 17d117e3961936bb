// A tile of a matrix product in registers: up to `tile_rows` x 32 sums.
//
// Included where `Operand` is defined, and how two of them are multiplied (`spread`, `multiply_add`): floats one by one
// (product_floats.h), or bfloat16 pairs by one instruction.  The left operand is read element by element, the right one
// in vectors from panels of 32 columns.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vectors.h"

namespace {

constexpr int tile_rows = fpn::cpu::tile_rows;
constexpr int64_t panel_columns = fpn::cpu::panel_columns;

// Left operand of a tile: element (row, k) is at data[row * row_stride + k * k_stride].
struct Left {
  const Operand* data;
  int64_t row_stride, k_stride;
};

// sums = left x panel, over `count` operands.
template <int rows, bool unit_k>
inline __attribute__((always_inline)) void multiply_tile(
    Left left, const Operand* panel, int64_t count, __m512 (&sums)[rows][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  // Four rows share an address register: x86 has too few of them for one each.
  const Operand* quads[(rows + 3) / 4];
#pragma GCC unroll 16
  for (int q = 0; q < (rows + 3) / 4; ++q) {
    quads[q] = left.data + 4 * q * left.row_stride;
    asm("" : "+r"(quads[q]));
  }
  const int64_t stride = left.row_stride;
  for (int64_t k = 0; k < count; ++k) {
    const __m512 first = _mm512_loadu_ps(panel), second = _mm512_loadu_ps(panel + 16);
    panel += panel_columns;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const __m512 value = spread(quads[i / 4] + (i % 4) * stride);
      sums[i][0] = multiply_add(sums[i][0], value, first);
      sums[i][1] = multiply_add(sums[i][1], value, second);
    }
#pragma GCC unroll 16
    for (int q = 0; q < (rows + 3) / 4; ++q) quads[q] += unit_k ? 1 : left.k_stride;
  }
}

// Calls step with the number of rows, 1 .. tile_rows, as a constant.
template <class Step>
inline void with_rows(int64_t rows, Step&& step) {
  static_assert(tile_rows == 12);
  switch (rows) {
    case 12: return step(std::integral_constant<int, 12>{});
    case 11: return step(std::integral_constant<int, 11>{});
    case 10: return step(std::integral_constant<int, 10>{});
    case 9: return step(std::integral_constant<int, 9>{});
    case 8: return step(std::integral_constant<int, 8>{});
    case 7: return step(std::integral_constant<int, 7>{});
    case 6: return step(std::integral_constant<int, 6>{});
    case 5: return step(std::integral_constant<int, 5>{});
    case 4: return step(std::integral_constant<int, 4>{});
    case 3: return step(std::integral_constant<int, 3>{});
    case 2: return step(std::integral_constant<int, 2>{});
    default: return step(std::integral_constant<int, 1>{});
  }
}

}  // namespace
