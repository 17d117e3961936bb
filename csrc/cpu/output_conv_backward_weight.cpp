// The gradient of the 3x3 convolution's weight and bias, by Winograd's minimal filtering, where that is faster than
// PyTorch's own; elsewhere nothing is done, and the caller takes that.

#include "output_conv_backward_weight.h"

#include <algorithm>
#include <vector>

#include "../operators.h"
#include "capability.h"
#include "output_conv.h"
#include "output_conv_scratch.h"

namespace fpn::cpu {

namespace {

// Tiles transformed, and added up in registers, at a time.  Longer sums round less.
constexpr int64_t block_tiles = 32;

bool faster(const OutputConvBackwardWeight& call) {
  // Not measured on AVX-512.
  if (product_of(call.conv.dtype) != Product::floats || level() != Level::avx2) return false;
  return call.conv.cin >= 16 && call.conv.cout >= 16 && call.conv.tiles >= 64;
}

// Parts of equal size, smaller ones where there would be fewer than threads.  Bits do not depend on them.  Measured with
// 256 channels on Zen 3: parts of 128 by 64 channels and blocks of 32 tiles 192 ms at 150 x 225 pixels, 64 by 64 and 16
// 243, 64 by 32 and 16 272; blocks of 8 tiles 291.
void choose_parts(OutputConvBackwardWeight& call) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto divide = [](int64_t channels, int64_t most, int64_t multiple, int64_t& part, int64_t& parts) {
    parts = divide_up(channels, most);
    part = divide_up(divide_up(channels, parts), multiple) * multiple;
    parts = divide_up(channels, part);
  };
  for (const auto& [most_out, most_in] : {std::pair(128, 64), std::pair(64, 64), std::pair(64, 32), std::pair(32, 32), std::pair(16, 32)}) {
    divide(call.conv.cout, most_out, 16, call.part_out, call.parts_out);
    divide(call.conv.cin, most_in, panel_columns, call.part_in, call.parts_in);
    if (call.parts_out * call.parts_in >= threads) return;
  }
}

void place(OutputConvBackwardWeight& call) {
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

}  // namespace

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
  const Result result = grad_weight.result();
  grad_weight.check_apart({&grad, &feature, grad_bias});
  double* bias_sums = nullptr;
  if (grad_bias != nullptr) {
    grad_bias->check_dense_vector();
    grad_bias->check_apart({&grad, &feature});
    bias_sums = static_cast<double*>(grad_bias->data());
  }
  if (grad.numel() == 0 || feature.numel() == 0) return false;
  if (product_of(grad.dtype()) == Product::tiles) {
    return output_conv_backward_weight_bfloat16(grad, feature, grad_weight, bias_sums);
  }
  OutputConvBackwardWeight call{};
  call.conv = convolution_of(feature, grad.size(1));
  call.grad = grad.map();
  if (!faster(call) || call.grad.stride_c != 1 || call.conv.feature.stride_c != 1) return false;
  call.out = result;
  call.bias_sums = bias_sums;
  call.block = block_tiles;
  choose_parts(call);
  place(call);
  const int64_t units = call.parts_out * call.parts_in;
  // More threads than units: PyTorch's own shares out the pixels.
  if (units < torch::stable::get_num_threads()) return false;
  std::vector<uint8_t> finite(static_cast<size_t>(units), 0);
  call.finite = finite.data();
#if defined(__x86_64__)
  const int64_t elements = call.conv.tiles * call.part_in * 16;
  run_units(FPN_CHOOSE_PRODUCT(output_conv_backward_weight_parts), call, units, elements, call.scratch_bytes);
#endif
  return std::all_of(finite.begin(), finite.end(), [](uint8_t one) { return one != 0; });
}

}  // namespace fpn::cpu
