#include "amx_driver.h"

#include "../amx/packed_operands.h"
#include "../layout.h"
#include "../resize_table.h"
#include "amx_kernel.h"

namespace fpn::cpu {

namespace {

// Scratch memory for a block's pixels.  A group of tiles has 48 pixels.
constexpr int64_t pixels_bytes = int64_t{128} << 10;
constexpr int64_t group_pixels = 48;

// Each row of a tile must be one cache line, and the pixels must not exceed the associativity of L1.
bool may_read_in_place(const LateralConnection& call) {
  constexpr int64_t line = 64, most = 1024;
  return call.feature.stride_c == 1 && evenly_spaced(call.feature) && call.cin % amx_tile_channels == 0 &&
      call.feature.stride_x * 2 % line == 0 && call.feature.stride_x <= most &&
      (reinterpret_cast<uintptr_t>(call.feature.data) + call.feature.stride_n * 2) % line == 0 &&
      reinterpret_cast<uintptr_t>(call.feature.data) % line == 0;
}

void choose_blocks(AmxLateralConnection& all, int64_t batch) {
  LateralConnection& call = all.call;
  const int64_t pixels = call.height * call.width, threads = torch::stable::get_num_threads();
  const int64_t pixel = std::max<int64_t>(1, all.weight.chunks) * amx_pixel_bytes;
  const int64_t groups = std::clamp<int64_t>(pixels_bytes / pixel / group_pixels, 1, 8);
  const int64_t units = divide_up(batch * divide_up(pixels, groups * group_pixels), threads) * threads;
  const int64_t line = divide_up(divide_up(pixels, divide_up(units, batch)), amx_tile_pixels) * amx_tile_pixels;
  call.block = line;
  call.blocks = divide_up(pixels, line);
  all.in_place = may_read_in_place(call);
  all.fetches = pixels * call.cin * 2 >= streaming_bytes;
  all.plane = line * amx_pixel_bytes;
  all.sums_at = all.plane * all.weight.chunks;
  all.offsets_at = all.sums_at + 2 * amx_sums_bytes;
  all.top_offsets_at = all.offsets_at + line_bytes(line + amx_tile_pixels, sizeof(int64_t));
  all.scratch_bytes = all.top_offsets_at + line_bytes(line, amx_top_offsets_bytes);
}

}  // namespace

void lateral_connection_amx(
    const Argument& feature,
    const Argument& weight,
    const Argument& bias,
    const Argument* top,
    Mode mode,
    double gain,
    const Output& out) {
  AmxLateralConnection all{};
  LateralConnection& call = all.call;
  call.dtype = Dtype::bfloat16;
  call.feature = feature.map();
  call.out = out.result();
  if (top != nullptr) call.top = top->map();
  call.height = call.feature.height;
  call.width = call.feature.width;
  call.cin = feature.size(1);
  call.cout = weight.size(0);
  call.gain = gain;
  call.bilinear = mode == Mode::bilinear;
  const ResizeTable rows(top != nullptr ? call.top.height : 1, call.height, mode, call.dtype);
  const ResizeTable columns(top != nullptr ? call.top.width : 1, call.width, mode, call.dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  const int64_t strides[4] = {weight.stride(0), weight.stride(1), 0, 0};
  const AmxOperands operands(weight, strides, 1, &bias);
  all.weight = operands.weight();
  call.bias = operands.bias();
  const int64_t batch = feature.size(0);
  choose_blocks(all, batch);
  operands.pack();
#if defined(FPN_AMX)
  run_units(
      &amx::lateral_connection_blocks, all, batch * call.blocks, call.block * call.cout, all.scratch_bytes);
#endif
}

}  // namespace fpn::cpu
