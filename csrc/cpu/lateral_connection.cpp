// The 1x1 convolution, its bias and the merge in one pass, where this CPU multiplies faster that way than by PyTorch's
// own matrix product; elsewhere nothing is done, and the caller takes that.

#include <vector>

#include "lateral_connection.h"

#include "../operators.h"
#include "capability.h"
#include "maps.h"
#include "tables.h"

namespace fpn::cpu {

namespace {

constexpr int64_t operand_bytes = 4;

int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

bool top_fits(const Map& top, bool channels_last) { return channels_last ? top.stride_c == 1 : top.stride_x == 1; }

// Blocks of one size over a map, a whole number of them for each thread where that can be.  Their sums stay in the second
// cache: with room for 320 pixels whatever the output channels, 256 to 2,048 channels in NCHW took 1.4 times as long
// (Zen 3, 512 KB of it).
void choose_blocks(LateralConnection& call, int64_t batch) {
  const int64_t pixels = call.height * call.width;
  const int64_t multiple = call.channels_last && call.feature_channels_last ? tile_rows : panel_columns;
  constexpr int64_t room = int64_t{320} << 10;
  const int64_t fitting = std::max(room / (4 * std::max<int64_t>(call.cout, 1)), panel_columns);
  const int64_t wanted = std::min<int64_t>(call.channels_last ? 96 : 320, fitting);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = round_up(batch * divide_up(pixels, wanted), threads);
  call.block = round_up(divide_up(pixels, divide_up(units, batch)), multiple);
  call.blocks = divide_up(pixels, call.block);
}

// AVX2's float32 is multiplied as fast by oneDNN.  Its convolution alone, against the product here on two cores of Zen 3:
// 0.83 to 0.96 of the time on up to 4,000 pixels and in NHWC, 0.93 to 0.97 with 512 channels and more; but 1.2 to 2.2
// times in NCHW on 8,475 pixels and more.  The merge that is saved is worth 5 to 15 % with fewer channels.
bool faster(const LateralConnection& call, int64_t batch) {
  if (level() != Level::avx2 || call.dtype != Dtype::float32) return true;
  const bool many_pixels = batch * call.height * call.width >= 8192;
  return call.cin < 512 && (call.top.data != nullptr || (!call.channels_last && many_pixels));
}

[[maybe_unused]] int64_t scratch_bytes(const LateralConnection& call) {
  const int64_t columns = round_up(call.block, panel_columns);
  const int64_t packed = line_bytes(columns * chunk, operand_bytes);
  if (call.channels_last) return line_bytes(call.block * round_up(call.cout, panel_columns), 4) + packed;
  const int64_t lines = 3 * line_bytes(std::max(call.width, call.top.width), 4);
  return line_bytes(call.cout * columns, 4) + std::max(packed, lines);
}

}  // namespace

bool lateral_connection(
    const Tensor& feature_tensor,
    const Tensor& weight_tensor,
    const Tensor& bias_tensor,
    const std::optional<Tensor>& top_tensor,
    int64_t mode_number,
    double gain,
    Tensor out_tensor) {
  const Mode mode = mode_of(mode_number);
  const Argument feature("feature", feature_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument weight("weight", weight_tensor, {any, feature.size(1)}, feature);
  const int64_t batch = feature.size(0), cout = weight.size(0);
  const Argument bias("bias", bias_tensor, {cout}, feature, {Dtype::float32});
  bias.check_dense_vector();
  const Optional optional_top("top", top_tensor, {batch, cout, any, any}, feature);
  const Argument* top = optional_top.get();
  const Output out("out", out_tensor, {batch, cout, feature.size(2), feature.size(3)}, feature);
  out.check_apart({&feature, &weight, &bias, top});
  LateralConnection call{};
  call.dtype = feature.dtype();
  call.out = out.result();
  if (out.numel() == 0 || feature.numel() == 0) return false;
  if (top != nullptr) top->check_pixels();
  const Product product = product_of(call.dtype);
  if (product == Product::none) return false;
  if (product == Product::tiles) {
    return lateral_connection_bfloat16(feature, weight, bias, top, mode, gain, out);
  }
  call.feature = feature.map();
  call.channels_last = call.out.stride_x != 1;
  call.feature_channels_last = call.feature.stride_x != 1;
  const bool feature_fits = evenly_spaced(call.feature) &&
      (call.feature_channels_last ? call.feature.stride_c == 1 && call.channels_last : true);
  if (!feature_fits) return false;
  if (top != nullptr) {
    call.top = top->map();
    if (!top_fits(call.top, call.channels_last)) return false;
  }
  call.height = call.feature.height;
  call.width = call.feature.width;
  call.cin = feature.size(1);
  call.cout = cout;
  if (!faster(call, batch)) return false;
  call.weight_from = weight.data();
  call.weight_row_stride = weight.stride(0);
  call.weight_column_stride = weight.stride(1);
  call.bias = static_cast<const float*>(bias.data());
  call.gain = gain;
  call.bilinear = mode == Mode::bilinear;
  const bool pairs = product == Product::pairs;
  call.operands = pairs ? divide_up(call.cin, 2) : call.cin;
  const int64_t top_height = top != nullptr ? call.top.height : 1, top_width = top != nullptr ? call.top.width : 1;
  const ForwardTable rows(top_height, call.height, mode, call.dtype);
  const ForwardTable columns(top_width, call.width, mode, call.dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  choose_blocks(call, batch);
  const int64_t weight_units = call.channels_last ? divide_up(call.cout, panel_columns) : call.cout;
  // Rows of a power of two of bytes, of which a tile reads several abreast, would fall into one set of the first cache.
  constexpr int64_t cache_line = 64 / operand_bytes;
  call.weight_line = call.channels_last ? call.operands * panel_columns : round_up(call.operands, cache_line) + cache_line;
  Scratch packed_weight(weight_units * call.weight_line * operand_bytes);
  call.weight = packed_weight.data();
#if defined(__x86_64__)
  const auto pack = pairs ? &avx512bf16::lateral_connection_weight : FPN_CHOOSE_PRODUCT(lateral_connection_weight);
  const auto multiply = pairs ? &avx512bf16::lateral_connection_blocks : FPN_CHOOSE_PRODUCT(lateral_connection_blocks);
  run_units(pack, call, weight_units, call.weight_line, 0);
  run_units(multiply, call, batch * call.blocks, call.block * call.cout, scratch_bytes(call));
#endif
  return true;
}

}  // namespace fpn::cpu
