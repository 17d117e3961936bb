#include "amx_driver.h"

#include "../amx/packed_operands.h"
#include "amx_kernel.h"

namespace fpn::cpu {

namespace {

// Scratch memory of a block; the weight (1.2 MB at 256 channels) and the block's results also occupy L2 (2 MB).
constexpr int64_t block_bytes = int64_t{256} << 10;
// A tile of fewer pixels takes the same time: the loads of its operands dominate.
constexpr int64_t min_rows = 10;

// Tiles of equal width per row, or tiles that continue from row to row (flat): the option that wastes less.
void choose_tiles(AmxOutputConv& call) {
  const int64_t width = call.feature.width, tiles = divide_up(width, amx_tile_pixels);
  call.rows = divide_up(width, tiles);
  call.tiles_across = tiles;
  call.blocks_across = divide_up(tiles, 2);
  const int64_t by_row = tiles * std::max(call.rows, min_rows);
  call.flat = call.blocks_across == 1 && width + 2 < by_row;
  if (call.flat) call.rows = amx_tile_pixels;
  call.pitch = 2 + (call.flat ? width : divide_up(tiles, call.blocks_across) * call.rows);
}

// Rows that fit the cache, and the same number of blocks per thread.  If there are too few blocks, each is split into
// parts of the output channels.
void choose_blocks(AmxOutputConv& call) {
  const int64_t height = call.feature.height, threads = torch::stable::get_num_threads();
  const int64_t row = call.pitch * amx_pixel_bytes * call.weight.chunks;
  const int64_t most = std::clamp<int64_t>(block_bytes / row - 2, 1, height);
  const int64_t beside = call.batch * call.blocks_across;
  int64_t blocks = divide_up(height, most);
  if (beside % threads != 0 && beside * blocks < 8 * threads) blocks = divide_up(blocks, threads) * threads;
  call.blocks_down = std::min(blocks, height);
  const int64_t all = beside * call.blocks_down;
  call.parts = all % threads == 0 || all >= 8 * threads ? 1 : std::min(call.weight.panels, threads);
  const int64_t rows = divide_up(height, call.blocks_down) + 2;
  call.plane = rows * call.pitch * amx_pixel_bytes;
  call.sums_at = call.plane * call.weight.chunks;
  call.offsets_at = call.sums_at + 2 * amx_sums_bytes;
  // The last tile may extend beyond the last row.
  call.scratch_bytes = call.offsets_at + line_bytes(rows * call.pitch + amx_tile_pixels, sizeof(int64_t));
}

}  // namespace

void output_conv_amx(const Argument& feature, const Argument& weight, const Argument* bias, const Output& out) {
  AmxOutputConv call{};
  call.feature = feature.map();
  call.out = out.result();
  call.batch = feature.size(0);
  const int64_t strides[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const AmxOperands operands(weight, strides, 9, bias);
  call.weight = operands.weight();
  call.bias = operands.bias();
  choose_tiles(call);
  choose_blocks(call);
  operands.pack();
#if defined(FPN_AMX)
  const int64_t units = call.batch * call.blocks_down * call.blocks_across * call.parts;
  const int64_t elements = call.plane / 2 * call.weight.chunks;
  run_units(&amx::output_conv_blocks, call, units, elements, call.scratch_bytes);
#endif
}

}  // namespace fpn::cpu
