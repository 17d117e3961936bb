#include <vector>

#include "../parallel.h"
#include "amx_driver.h"
#include "backward_weight_amx_kernel.h"

namespace fpn::cpu {

namespace {

constexpr int64_t step_positions = 32, step_bytes = 1024;  // of sixteen channels
constexpr int64_t line_steps = 8;
// Steps per block.  8 and 16 took 1.02 to 1.05 times as long (256 channels, an Intel Xeon with AMX).
constexpr int64_t block_steps = 12;

void choose_blocks(AmxOutputConvBackwardWeight& call) {
  const int64_t rows = call.batch * (call.grad.height + 1) - 1;
  call.pitch = call.grad.width + 1;
  call.steps = divide_up(rows * call.pitch - 1, step_positions);
  call.blocks = divide_up(call.steps, block_steps);
  call.max_steps = divide_up(call.steps, call.blocks);
  call.halo = divide_up(call.pitch + 1, step_positions);
  call.window_bytes = (2 * call.halo + call.max_steps) * step_bytes;
}

// A model of a unit's time per step: the products, slower if the sums (36 KB per 32 by 32 channels) exceed L2, and the
// copies of both operands.
int64_t unit_time(int64_t panels, int64_t chunks) {
  const int64_t product = panels * chunks > 32 ? 8 : 7;
  return product * panels * chunks + 3 * panels + 4 * chunks;
}

// The parts with the shortest total time on all threads.
void choose_parts(AmxOutputConvBackwardWeight& call) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t shortest = 0;
  for (int64_t out = 1; out <= call.panels; ++out) {
    for (int64_t in = 1; in <= call.chunks; ++in) {
      const int64_t time =
          divide_up(out * in, threads) * unit_time(divide_up(call.panels, out), divide_up(call.chunks, in));
      if (shortest != 0 && time >= shortest) continue;
      shortest = time;
      call.parts_out = out;
      call.parts_in = in;
    }
  }
}

void choose_offsets(AmxOutputConvBackwardWeight& call) {
  const int64_t panels = divide_up(call.panels, call.parts_out), chunks = divide_up(call.chunks, call.parts_in);
  call.left_at = 0;
  call.right_at = call.left_at + panels * 2 * call.max_steps * step_bytes;
  call.sums_at = call.right_at + 2 * chunks * 2 * call.window_bytes;
  call.lines_at = call.sums_at + panels * chunks * 4 * 9 * 1024;
  call.pixels_at = call.lines_at + line_bytes(32 * (1 + line_steps) * step_positions, 2);
  const int64_t steps = std::max(2 * call.halo, call.max_steps);
  call.zeros_at = call.pixels_at + line_bytes((steps + 1) * step_positions + 1, sizeof(void*));
  call.scratch_bytes = call.zeros_at + std::max(panels, chunks) * amx_pixel_bytes;
}

}  // namespace

bool backward_weight_fits_amx(const Argument& grad, const Argument& feature) {
  // The feature's rows above and below a block would dominate the copy.  PyTorch's time relative to the tiles': 0.67 at
  // a width of 8,000 and 1.33 at 2,000.
  if (grad.size(3) > 2048) return false;
  // With more threads than units PyTorch, which divides the pixels, is faster.
  const int64_t panels = divide_up(grad.size(1), amx_panel_channels);
  const int64_t chunks = divide_up(feature.size(1), amx_tile_channels);
  return panels * chunks >= torch::stable::get_num_threads();
}

bool output_conv_backward_weight_amx(
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
  call.bias_sums = bias_sums;
  if (bias_sums != nullptr) std::fill(bias_sums, bias_sums + call.cout, 0.0);
  choose_blocks(call);
  choose_parts(call);
  choose_offsets(call);
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
