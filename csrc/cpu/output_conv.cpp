// The 3x3 convolution with its bias, by Winograd's minimal filtering, where that is faster than PyTorch's own;
// elsewhere nothing is done, and the caller takes that.

#include "../operators.h"
#include "capability.h"
#include "maps.h"
#include "output_conv_scratch.h"

namespace fpn::cpu {

namespace {

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

bool faster([[maybe_unused]] const OutputConv& call) {
  if (level() != Level::avx512 || call.cin == 0) return false;
  return call.dtype == Dtype::float32 || call.dtype == Dtype::float16;
}

// Blocks of one size, the same number of them for each thread.
void choose_block(OutputConv& call) {
  const int64_t room = int64_t{800} << 10;
  int64_t most = room / (elements_of_tile * 4 * std::max<int64_t>(call.cin, 1)) / tile_rows * tile_rows;
  most = std::clamp<int64_t>(most, tile_rows, max_block);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = divide_up(divide_up(call.tiles, most), threads) * threads;
  call.block = std::max<int64_t>(1, divide_up(call.tiles, units));
}

}  // namespace

bool output_conv(const Tensor& feature, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  OutputConv call{};
  call.dtype = dtype_of(feature);
  call.feature = map_of(feature);
  call.out = result_of(out);
  call.batch = feature.size(0);
  call.cin = feature.size(1);
  call.cout = weight.size(0);
  call.tiles_down = divide_up(call.feature.height, 2);
  call.tiles_across = divide_up(call.feature.width, 2);
  call.tiles = call.batch * call.tiles_down * call.tiles_across;
  if (!faster(call)) return false;
  if (call.tiles == 0 || call.cout == 0) return true;
  call.weight_from = weight.const_data_ptr();
  for (int i = 0; i < 4; ++i) call.weight_strides[i] = weight.stride(i);
  if (bias.has_value()) {
    call.bias_from = bias->const_data_ptr();
    call.bias_stride = bias->stride(0);
  }
  call.feature_channels_last = call.feature.stride_c == 1 && call.feature.stride_x != 1;
  call.channels_last = call.out.stride_x != 1;
  choose_block(call);
  const int64_t panels = divide_up(call.cout, panel_columns);
  const int64_t weight_bytes = line_bytes(panels * panel_columns * call.cin * elements_of_tile, 4);
  Scratch room(weight_bytes + panels * panel_columns * 4);
  call.weight = reinterpret_cast<float*>(room.data());
  call.bias = reinterpret_cast<float*>(room.data() + weight_bytes);
#if defined(__x86_64__)
  run_units(&avx512::output_conv_weight, call, panels * divide_up(call.cin, 16), 16 * 9 * panel_columns, 0);
  run_units(&avx512::output_conv_blocks, call, divide_up(call.tiles, call.block), 16 * call.block * call.cout,
            OutputConvScratch(call).bytes);
#endif
  return true;
}

}  // namespace fpn::cpu
