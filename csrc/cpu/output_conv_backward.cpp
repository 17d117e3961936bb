// The gradient of the 3x3 convolution's weight and bias of bfloat16 maps, where this CPU has AMX; elsewhere nothing is
// done, and the caller takes PyTorch's own.

#include <cstdlib>
#include <vector>

#include "../operators.h"
#include "capability.h"
#include "maps.h"

namespace fpn::cpu {

namespace {

constexpr int64_t step_positions = 32, step_bytes = 1024;

int64_t knob(const char* name, int64_t value) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : value;
}

void choose_blocks(AmxOutputConvBackward& call) {
  const int64_t rows = call.batch * (call.grad.height + 1) - 1;
  call.steps = divide_up(rows * call.pitch - 1, step_positions);
  call.blocks = divide_up(call.steps, knob("FPN_STEPS", 16));
  call.most_steps = divide_up(call.steps, call.blocks);
  call.halo = divide_up(call.pitch + 1, step_positions);
  call.window_steps = 2 * call.halo + call.most_steps + knob("FPN_EXTRA", 8);
  call.window_bytes = call.window_steps * step_bytes;
}

void choose_parts(AmxOutputConvBackward& call) {
  call.parts_out = knob("FPN_OUT", 1);
  call.parts_in = knob("FPN_IN", 2);
}

void place(AmxOutputConvBackward& call) {
  const int64_t panels = divide_up(call.panels, call.parts_out), chunks = divide_up(call.chunks, call.parts_in);
  call.left_at = 0;
  call.right_at = call.left_at + panels * 2 * call.most_steps * step_bytes;
  call.sums_at = call.right_at + 2 * chunks * 2 * call.window_bytes;
  call.lines_at = call.sums_at + panels * chunks * 4 * 9 * 1024;
  call.pixels_at = call.lines_at + line_bytes(32 * (1 + 8) * step_positions, 2);
  const int64_t steps = std::max(2 * call.halo, call.most_steps);
  call.zeros_at = call.pixels_at + line_bytes((steps + 1) * step_positions + 1, sizeof(void*));
  call.scratch_bytes = call.zeros_at + std::max(panels, chunks) * amx_pixel_bytes;
}

}  // namespace

bool output_conv_backward(
    const Tensor& grad, const Tensor& feature, Tensor grad_weight, std::optional<Tensor> grad_bias) {
  if (dtype_of(grad) != Dtype::bfloat16 || product_of(Dtype::bfloat16) != Product::tiles) return false;
  AmxOutputConvBackward call{};
  call.grad = map_of(grad);
  call.feature = map_of(feature);
  call.out = result_of(grad_weight);
  call.batch = grad.size(0);
  call.cout = grad.size(1);
  call.cin = feature.size(1);
  if (call.batch == 0 || call.cout == 0 || call.cin == 0) return false;
  call.panels = divide_up(call.cout, amx_panel_channels);
  call.chunks = divide_up(call.cin, amx_tile_channels);
  call.pitch = call.grad.width + 1;
  if (grad_bias.has_value()) {
    STD_TORCH_CHECK(
        grad_bias->scalar_type() == torch::headeronly::ScalarType::Double && grad_bias->is_contiguous(),
        "grad_bias: expected a contiguous float64 tensor");
    call.bias_sums = static_cast<double*>(grad_bias->mutable_data_ptr());
    std::fill(call.bias_sums, call.bias_sums + call.cout, 0.0);
  }
  choose_blocks(call);
  choose_parts(call);
  place(call);
  const int64_t units = call.parts_out * call.parts_in;
  std::vector<uint8_t> finite(static_cast<size_t>(units), 0);
  call.finite = finite.data();
#if defined(FPN_AMX)
  const int64_t elements = call.batch * call.grad.height * call.grad.width * call.cin;
  run_units(&amx::output_conv_backward_parts, call, units, elements, call.scratch_bytes);
#endif
  return std::all_of(finite.begin(), finite.end(), [](uint8_t one) { return one != 0; });
}

}  // namespace fpn::cpu
