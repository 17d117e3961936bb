// The gradient of the 3x3 convolution's weight and bias of bfloat16 maps, where this CPU has AMX; elsewhere nothing is
// done, and the caller takes PyTorch's own.

#include "output_conv_backward_weight.h"

#include <vector>

#include "capability.h"
#include "maps.h"

namespace fpn::cpu {

namespace {

constexpr int64_t step_positions = 32, step_bytes = 1024;  // of sixteen channels
constexpr int64_t line_steps = 8;
// Of a block.  Measured with 256 channels on an Intel Xeon with AMX: 8 and 16 took 1.02 to 1.05 times as long.
constexpr int64_t block_steps = 12;

void choose_blocks(AmxOutputConvBackwardWeight& call) {
  const int64_t rows = call.batch * (call.grad.height + 1) - 1;
  call.pitch = call.grad.width + 1;
  call.steps = divide_up(rows * call.pitch - 1, step_positions);
  call.blocks = divide_up(call.steps, block_steps);
  call.most_steps = divide_up(call.steps, call.blocks);
  call.halo = divide_up(call.pitch + 1, step_positions);
  call.window_bytes = (2 * call.halo + call.most_steps) * step_bytes;
}

// A unit's time, all but the number of steps: its products, dearer where the sums (36 KB for 32 by 32 channels) leave
// the second cache, and the copies of both operands.
int64_t unit_time(int64_t panels, int64_t chunks) {
  const int64_t product = panels * chunks > 32 ? 8 : 7;
  return product * panels * chunks + 3 * panels + 4 * chunks;
}

// The units that are finished first, shared out to the threads.
void choose_parts(AmxOutputConvBackwardWeight& call) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t least = 0;
  for (int64_t out = 1; out <= call.panels; ++out) {
    for (int64_t in = 1; in <= call.chunks; ++in) {
      const int64_t time =
          divide_up(out * in, threads) * unit_time(divide_up(call.panels, out), divide_up(call.chunks, in));
      if (least != 0 && time >= least) continue;
      least = time;
      call.parts_out = out;
      call.parts_in = in;
    }
  }
}

void place(AmxOutputConvBackwardWeight& call) {
  const int64_t panels = divide_up(call.panels, call.parts_out), chunks = divide_up(call.chunks, call.parts_in);
  call.left_at = 0;
  call.right_at = call.left_at + panels * 2 * call.most_steps * step_bytes;
  call.sums_at = call.right_at + 2 * chunks * 2 * call.window_bytes;
  call.lines_at = call.sums_at + panels * chunks * 4 * 9 * 1024;
  call.pixels_at = call.lines_at + line_bytes(32 * (1 + line_steps) * step_positions, 2);
  const int64_t steps = std::max(2 * call.halo, call.most_steps);
  call.zeros_at = call.pixels_at + line_bytes((steps + 1) * step_positions + 1, sizeof(void*));
  call.scratch_bytes = call.zeros_at + std::max(panels, chunks) * amx_pixel_bytes;
}

}  // namespace

bool output_conv_backward_weight_bfloat16(
    const Argument& grad, const Argument& feature, const Output& grad_weight, double* bias_sums) {
  AmxOutputConvBackwardWeight call{};
  call.grad = grad.map();
  call.feature = feature.map();
  call.out = grad_weight.result();
  call.batch = grad.size(0);
  call.cout = grad.size(1);
  call.cin = feature.size(1);
  call.panels = divide_up(call.cout, amx_panel_channels);
  call.chunks = divide_up(call.cin, amx_tile_channels);
  // The feature's rows above and below a block would be most of what is copied: at a width of 8,000 PyTorch's own took
  // two thirds of the time, at 2,000 four thirds.
  if (grad.size(3) > 2048) return false;
  // More threads than units: PyTorch's own shares out the pixels.
  if (call.panels * call.chunks < torch::stable::get_num_threads()) return false;
  call.bias_sums = bias_sums;
  if (bias_sums != nullptr) std::fill(bias_sums, bias_sums + call.cout, 0.0);
  choose_blocks(call);
  choose_parts(call);
  place(call);
  const int64_t units = call.parts_out * call.parts_in;
  std::vector<uint8_t> finite(static_cast<size_t>(units), 0);
  call.finite = finite.data();
#if defined(FPN_AMX)
  const int64_t elements = call.batch * call.grad.height * call.grad.width * call.cin;
  run_units(&amx::output_conv_backward_weight_parts, call, units, elements, call.scratch_bytes);
#endif
  return std::all_of(finite.begin(), finite.end(), [](uint8_t one) { return one != 0; });
}

}  // namespace fpn::cpu
