// The 3x3 convolution (stride 1, padding 1) with its bias: by AMX tiles, or by Winograd's minimal filtering.

#include "../isa.h"
#include "../parallel.h"
#include "amx_driver.h"
#include "winograd_call.h"

namespace fpn::cpu {

namespace {

// Whether Winograd's filtering is faster than PyTorch's convolution in the same layout.
// - float32 on one thread of Zen 4, 256 to 256 channels: 1.6 times as fast from 7 x 10 pixels, 1.2 on 4 x 8; 0.9 on
//   4 x 4, where the weight transform dominates, and 0.9 on a single row, where oneDNN skips the padding.
// - float32 by AVX2 on two cores of Zen 3: 1.2 to 1.8 times as fast from 13 x 20 pixels.
// - Up to 16 output channels leave half a panel empty (0.9).  8 input channels are the fewest with a gain in both
//   layouts.  Beyond 512 input channels the sums round more than oneDNN's.
// - float16: oneDNN runs at a fifth of float32's rate at most.
// - bfloat16 with hardware support: no gain (220 against 225 GFLOP/s for the plain sum).
bool winograd_is_faster(const OutputConv& call) {
  const int64_t height = call.feature.height, width = call.feature.width, pixels = call.batch * height * width;
  if (call.dtype != Dtype::float32) return call.cin > 0 && pixels >= 8;
  return call.cin >= 8 && call.cin <= 512 && call.cout > 16 && height > 1 && width > 1 && pixels >= 32;
}

// The product that computes a call.
Product choose_product(const Argument& feature, int64_t cout) {
  if (feature.numel() == 0 || cout == 0) return Product::convolution;
  const Product product = product_of(feature.dtype());
  if (product == Product::amx_tiles) return product;
  const bool winograd = product == Product::fma && winograd_is_faster(convolution_of(feature, cout));
  return winograd ? product : Product::convolution;
}

// The transformed input of a block fills most of L2; every thread has the same number of blocks.  The time was the same
// from 24 to 96 tiles of 256 channels, with 1 MB of L2.
void choose_block(OutputConv& call) {
  constexpr int64_t input_bytes = int64_t{800} << 10;
  const int64_t fitting = input_bytes / (transformed_elements * 4 * call.cin) / tile_rows * tile_rows;
  const int64_t most = std::clamp(fitting, tile_rows, 8 * tile_rows);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = divide_up(divide_up(call.tiles, most), threads) * threads;
  call.block = divide_up(call.tiles, blocks);
}

void convolve_by_winograd(const Argument& feature, const Argument& weight, const Argument* bias, const Output& out) {
  OutputConv call = convolution_of(feature, weight.size(0));
  call.out = out.result();
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
  Scratch buffer(weight_bytes + line_bytes(columns, 4));
  call.weight = reinterpret_cast<float*>(buffer.data());
  call.bias = reinterpret_cast<float*>(buffer.data() + weight_bytes);
#if defined(__x86_64__)
  const int64_t weight_units = columns / panel_columns * divide_up(call.cin, 16);
  run_units(FPN_FMA_KERNEL(output_conv_weight), call, weight_units, 9 * 16 * panel_columns, 0);
  const int64_t blocks = divide_up(call.tiles, call.block), elements = 16 * call.block * call.cin;
  run_units(FPN_FMA_KERNEL(output_conv_blocks), call, blocks, elements, OutputConvScratch(call).bytes);
#endif
}

// Returns false, and writes nothing, if the call is left to PyTorch.
bool output_conv(
    const Tensor& feature_tensor,
    const Tensor& weight_tensor,
    const std::optional<Tensor>& bias_tensor,
    Tensor out_tensor) {
  const Argument feature("feature", feature_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument weight("weight", weight_tensor, {any, feature.size(1), 3, 3}, feature);
  const Optional bias("bias", bias_tensor, {weight.size(0)}, feature);
  const Output out("out", out_tensor, {feature.size(0), weight.size(0), feature.size(2), feature.size(3)}, feature);
  static_cast<void>(out.result());  // checks that it is dense
  out.check_apart({&feature, &weight, bias.get()});
  const Product product = choose_product(feature, weight.size(0));
  if (product == Product::convolution) return false;
  if (product == Product::amx_tiles) {
    output_conv_amx(feature, weight, bias.get(), out);
  } else {
    convolve_by_winograd(feature, weight, bias.get(), out);
  }
  return true;
}

// "AMX tiles", "Winograd, AVX2 FMA" or "Winograd, AVX-512 FMA"; "convolution" if output_conv returns false.
std::string output_conv_path(const Tensor& feature_tensor, const Tensor& weight_tensor) {
  const Argument feature("feature", feature_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument weight("weight", weight_tensor, {any, feature.size(1), 3, 3}, feature);
  const Product product = choose_product(feature, weight.size(0));
  return (product == Product::fma ? "Winograd, " : "") + name_of(product);
}

}  // namespace

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  // out: dense, in either layout whatever the feature's.
  m.def("output_conv(Tensor feature, Tensor weight, Tensor? bias, Tensor(a!) out) -> bool");
  m.def("output_conv_path(Tensor feature, Tensor weight) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("output_conv", TORCH_BOX(&fpn::cpu::output_conv));
  m.impl("output_conv_path", TORCH_BOX(&fpn::cpu::output_conv_path));
}
