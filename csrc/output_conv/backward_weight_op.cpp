// The gradients of the 3x3 convolution's weight and bias: by AMX tiles, or by Winograd's minimal filtering.

#include <vector>

#include "../isa.h"
#include "amx_driver.h"
#include "backward_weight_winograd.h"
#include "winograd_call.h"

namespace fpn::cpu {

namespace {

// Tiles that are transformed, and summed in registers, at a time.  Longer sums round less.
constexpr int64_t block_tiles = 32;

// Parts of equal size; smaller ones if there would be fewer than threads.  The bits do not depend on them.  256
// channels at 150 x 225 pixels on Zen 3: 192 ms with parts of 128 by 64 channels and blocks of 32 tiles, 243 with 64 by
// 64 and 16, 272 with 64 by 32 and 16, 291 with blocks of 8.
void choose_parts(OutputConvBackwardWeight& call) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto divide = [](int64_t channels, int64_t most, int64_t multiple, int64_t& part, int64_t& parts) {
    parts = divide_up(channels, most);
    part = divide_up(divide_up(channels, parts), multiple) * multiple;
    parts = divide_up(channels, part);
  };
  constexpr int64_t sizes[][2] = {{128, 64}, {64, 64}, {64, 32}, {32, 32}, {16, 32}};
  for (const auto& [max_out, max_in] : sizes) {
    divide(call.conv.cout, max_out, 16, call.part_out, call.parts_out);
    divide(call.conv.cin, max_in, panel_columns, call.part_in, call.parts_in);
    if (call.parts_out * call.parts_in >= threads) return;
  }
}

void choose_offsets(OutputConvBackwardWeight& call) {
  constexpr int64_t cache_line = 16;
  const int64_t panels = divide_up(call.part_in, panel_columns);
  call.grad_plane = call.block * call.part_out + cache_line;
  call.input_plane = call.block * panel_columns + cache_line;
  call.input_at = line_bytes(transformed_elements * call.grad_plane, 4);
  call.sums_at = call.input_at + line_bytes(transformed_elements * call.input_plane, 4);
  call.bias_at = call.sums_at + line_bytes(panels * transformed_elements * call.part_out * panel_columns, 4);
  call.zeros_at = call.bias_at + line_bytes(call.part_out, 8);
  call.scratch_bytes = call.zeros_at + line_bytes(std::max(call.part_out, panel_columns), 4);
}

OutputConvBackwardWeight winograd_call(const Argument& grad, const Argument& feature) {
  OutputConvBackwardWeight call{};
  call.conv = convolution_of(feature, grad.size(1));
  call.grad = grad.map();
  call.block = block_tiles;
  choose_parts(call);
  return call;
}

// AVX-512 was not measured.  With more threads than units PyTorch, which divides the pixels, is faster.
bool winograd_is_faster(const OutputConvBackwardWeight& call) {
  return isa() == Isa::avx2 && call.conv.cin >= 16 && call.conv.cout >= 16 && call.conv.tiles >= 64 &&
      call.grad.stride_c == 1 && call.conv.feature.stride_c == 1 &&
      call.parts_out * call.parts_in >= torch::stable::get_num_threads();
}

// The product that computes a call.
Product choose_product(const Argument& grad, const Argument& feature) {
  if (grad.numel() == 0 || feature.numel() == 0) return Product::convolution;
  const Product product = product_of(grad.dtype());
  const bool own = product == Product::amx_tiles
      ? backward_weight_fits_amx(grad, feature)
      : product == Product::fma && winograd_is_faster(winograd_call(grad, feature));
  return own ? product : Product::convolution;
}

bool multiply_by_winograd(
    const Argument& grad, const Argument& feature, const Output& grad_weight, double* bias_sums) {
  OutputConvBackwardWeight call = winograd_call(grad, feature);
  call.out = grad_weight.result();
  call.bias_sums = bias_sums;
  choose_offsets(call);
  const int64_t units = call.parts_out * call.parts_in;
  std::vector<uint8_t> finite(static_cast<size_t>(units), 0);
  call.finite = finite.data();
#if defined(__x86_64__)
  const int64_t elements = call.conv.tiles * call.part_in * 16;
  run_units(FPN_FMA_KERNEL(output_conv_backward_weight_parts), call, units, elements, call.scratch_bytes);
#endif
  return std::all_of(finite.begin(), finite.end(), [](uint8_t one) { return one != 0; });
}

// Returns false if the call is left to PyTorch; the results are then meaningless.
bool output_conv_backward_weight(
    const Tensor& grad_tensor,
    const Tensor& feature_tensor,
    Tensor grad_weight_tensor,
    std::optional<Tensor> grad_bias_tensor) {
  const Argument grad("grad", grad_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument feature("feature", feature_tensor, {grad.size(0), any, grad.size(2), grad.size(3)}, grad);
  const Output grad_weight("grad_weight", grad_weight_tensor, {grad.size(1), feature.size(1), 3, 3}, grad);
  const Optional<Output> optional_bias("grad_bias", grad_bias_tensor, {grad.size(1)}, grad, Dtype::float64);
  const Output* grad_bias = optional_bias.get();
  static_cast<void>(grad_weight.result());  // checks that it is dense
  grad_weight.check_apart({&grad, &feature, grad_bias});
  double* bias_sums = nullptr;
  if (grad_bias != nullptr) {
    grad_bias->check_dense_vector();
    grad_bias->check_apart({&grad, &feature});
    bias_sums = static_cast<double*>(grad_bias->data());
  }
  switch (choose_product(grad, feature)) {
    case Product::amx_tiles: return output_conv_backward_weight_amx(grad, feature, grad_weight, bias_sums);
    case Product::fma: return multiply_by_winograd(grad, feature, grad_weight, bias_sums);
    default: return false;
  }
}

// "AMX tiles" or "Winograd, AVX2 FMA"; "convolution" if output_conv_backward_weight returns false.  That also returns
// false if a value is not finite, which only the computation shows.
std::string output_conv_backward_weight_path(const Tensor& grad_tensor, const Tensor& feature_tensor) {
  const Argument grad("grad", grad_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument feature("feature", feature_tensor, {grad.size(0), any, grad.size(2), grad.size(3)}, grad);
  const Product product = choose_product(grad, feature);
  return (product == Product::fma ? "Winograd, " : "") + name_of(product);
}

}  // namespace

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  // grad_weight: dense.  grad_bias: float64.
  m.def(
      "output_conv_backward_weight(Tensor grad, Tensor feature, Tensor(a!) grad_weight, Tensor(b!)? grad_bias) "
      "-> bool");
  m.def("output_conv_backward_weight_path(Tensor grad, Tensor feature) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("output_conv_backward_weight", TORCH_BOX(&fpn::cpu::output_conv_backward_weight));
  m.impl("output_conv_backward_weight_path", TORCH_BOX(&fpn::cpu::output_conv_backward_weight_path));
}
