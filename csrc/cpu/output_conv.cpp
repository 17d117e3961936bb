// The 3x3 convolution with its bias, by Winograd's minimal filtering, where that is faster than PyTorch's own;
// elsewhere nothing is done, and the caller takes that.

#include "output_conv.h"

#include "../operators.h"
#include "capability.h"
#include "output_conv_scratch.h"

namespace fpn::cpu {

namespace {

// Measured on Zen 4, one thread, against PyTorch's own in the same layout.  float32, 256 to 256 channels: 1.6 times as
// fast on 7 x 10 pixels and above, 1.2 on 4 x 8, 0.9 on 4 x 4, where transforming the weight takes all the time, 0.9 on
// a single row, where oneDNN skips the padding; 3 to 16 output channels leave half a panel empty (0.9), and 8 input
// channels are the fewest with a gain in both layouts.  Beyond 512 the sums round more than oneDNN's.  On two cores of
// Zen 3 by AVX2 1.2 to 1.8 times as fast on 13 x 20 pixels and above.  float16: oneDNN runs at a fifth of float32's rate
// and less; by AVX2 neither that nor bfloat16 has instructions.
// bfloat16 gains nothing where the processor multiplies it: 220 against 225 GFLOP/s of the plain sum.
bool faster(const OutputConv& call) {
  if (product_of(call.dtype) != Product::floats) return false;
  const int64_t height = call.feature.height, width = call.feature.width, pixels = call.batch * height * width;
  if (call.dtype != Dtype::float32) return call.cin > 0 && pixels >= 8;
  return call.cin >= 8 && call.cin <= 512 && call.cout > 16 && height > 1 && width > 1 && pixels >= 32;
}

// Tiles whose transformed input fills the second cache but for what passes through it, the same number of blocks for
// each thread.  Measured flat from 24 to 96 tiles of 256 channels, with 1 MB of it.
void choose_block(OutputConv& call) {
  constexpr int64_t room = int64_t{800} << 10;
  const int64_t fitting = room / (transformed_elements * 4 * call.cin) / tile_rows * tile_rows;
  const int64_t most = std::clamp(fitting, tile_rows, 8 * tile_rows);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = divide_up(divide_up(call.tiles, most), threads) * threads;
  call.block = divide_up(call.tiles, blocks);
}

}  // namespace

bool output_conv(
    const Tensor& feature_tensor,
    const Tensor& weight_tensor,
    const std::optional<Tensor>& bias_tensor,
    Tensor out_tensor) {
  const Argument feature("feature", feature_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument weight("weight", weight_tensor, {any, feature.size(1), 3, 3}, feature);
  const Optional optional_bias("bias", bias_tensor, {weight.size(0)}, feature);
  const Argument* bias = optional_bias.get();
  const Output out("out", out_tensor, {feature.size(0), weight.size(0), feature.size(2), feature.size(3)}, feature);
  const Result result = out.result();
  out.check_apart({&feature, &weight, bias});
  if (out.numel() == 0 || feature.numel() == 0) return false;
  if (product_of(feature.dtype()) == Product::tiles) return output_conv_bfloat16(feature, weight, bias, out);
  OutputConv call = convolution_of(feature, weight.size(0));
  if (!faster(call)) return false;
  call.out = result;
  call.weight_from = weight.data();
  for (int i = 0; i < 4; ++i) call.weight_strides[i] = weight.stride(i);
  if (bias != nullptr) {
    call.bias_from = bias->data();
    call.bias_stride = bias->stride(0);
  }
  call.feature_channels_last = call.feature.stride_c == 1 && call.feature.stride_x != 1;
  call.channels_last = call.out.stride_x != 1;
  choose_block(call);
  const int64_t columns = divide_up(call.cout, panel_columns) * panel_columns;
  const int64_t weight_bytes = line_bytes(columns * call.cin * transformed_elements, 4);
  Scratch room(weight_bytes + line_bytes(columns, 4));
  call.weight = reinterpret_cast<float*>(room.data());
  call.bias = reinterpret_cast<float*>(room.data() + weight_bytes);
#if defined(__x86_64__)
  const int64_t weight_units = columns / panel_columns * divide_up(call.cin, 16);
  run_units(FPN_CHOOSE_PRODUCT(output_conv_weight), call, weight_units, 9 * 16 * panel_columns, 0);
  const int64_t blocks = divide_up(call.tiles, call.block);
  run_units(FPN_CHOOSE_PRODUCT(output_conv_blocks), call, blocks, 16 * call.block * call.cin, OutputConvScratch(call).bytes);
#endif
  return true;
}

}  // namespace fpn::cpu
