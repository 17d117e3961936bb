// out = gain * (weight x feature + bias + resize(top)): the 1x1 convolution, its bias and the merge in one pass.

#include "../isa.h"
#include "../layout.h"
#include "../parallel.h"
#include "../resize_table.h"
#include "amx_driver.h"
#include "kernel.h"

namespace fpn::cpu {

namespace {

constexpr int64_t operand_bytes = 4;

int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

// Blocks of equal size, if possible the same number per thread.  A block's sums stay in L2: with 320 pixels whatever
// the number of output channels, 256 to 2,048 channels in NCHW took 1.4 times as long (Zen 3, 512 KB of L2).
void choose_blocks(LateralConnection& call, int64_t batch) {
  const int64_t pixels = call.height * call.width;
  const int64_t multiple = call.channels_last && call.feature_channels_last ? tile_rows : panel_columns;
  constexpr int64_t sums_bytes = int64_t{320} << 10;
  const int64_t fitting = std::max(sums_bytes / (4 * std::max<int64_t>(call.cout, 1)), panel_columns);
  const int64_t wanted = std::min<int64_t>(call.channels_last ? 96 : 320, fitting);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = round_up(batch * divide_up(pixels, wanted), threads);
  call.block = round_up(divide_up(pixels, divide_up(units, batch)), multiple);
  call.blocks = divide_up(pixels, call.block);
}

[[maybe_unused]] int64_t scratch_bytes(const LateralConnection& call) {
  const int64_t columns = round_up(call.block, panel_columns);
  const int64_t packed = line_bytes(columns * chunk, operand_bytes);
  if (call.channels_last) return line_bytes(call.block * round_up(call.cout, panel_columns), 4) + packed;
  const int64_t lines = 3 * line_bytes(std::max(call.width, call.top.width), 4);
  return line_bytes(call.cout * columns, 4) + std::max(packed, lines);
}

// Whether PyTorch's convolution, followed by the merge, is faster on NHWC maps.
// - bfloat16, short sums and no top.  This library's time relative to the convolution: on Zen 5 1.03 to 1.05 at 256 and
//   1,024 channels, 0.88 at 2,048; by AMX tiles 1.07 at 256, 1.13 at 512, 0.89 at 1,024 and 0.84 at 2,048.
// - float32, long sums: 1.07, 1.14 and 1.28 at 512, 1,024 and 2,048 channels (an Intel Xeon with AMX).
bool convolution_is_faster_nhwc(Dtype dtype, int64_t cin, bool has_top) {
  if (dtype == Dtype::bfloat16) return cin <= 1024 && !has_top && onednn_multiplies_bfloat16();
  return dtype == Dtype::float32 && cin >= 512;
}

// AVX2 float32: oneDNN multiplies at the same rate.  Its convolution without the merge, relative to this library (two
// cores of Zen 3): 0.83 to 0.96 up to 4,000 pixels and in NHWC, 0.93 to 0.97 from 512 channels; but 1.2 to 2.2 in NCHW
// from 8,475 pixels.  With fewer channels the fused merge saves 5 to 15 %.
bool convolution_is_faster_avx2(int64_t cin, bool has_top, bool channels_last, int64_t pixels) {
  return cin >= 512 || !(has_top || (!channels_last && pixels >= 8192));
}

// The product that computes a call; channels_last: the result is NHWC.
Product choose_product(const Argument& feature, int64_t cout, const Argument* top, bool channels_last) {
  if (feature.numel() == 0 || cout == 0) return Product::none;
  const Dtype dtype = feature.dtype();
  const Map map = feature.map();
  const int64_t cin = feature.size(1);
  const bool has_top = top != nullptr, feature_channels_last = map.stride_x != 1;
  const bool nhwc = channels_last && feature_channels_last && map.stride_c == 1;
  if (nhwc && convolution_is_faster_nhwc(dtype, cin, has_top)) return Product::convolution;
  const Product product = product_of(dtype);
  if (product == Product::none) return product;
  if (product == Product::amx_tiles) return !has_top || top->stride(1) == 1 || cout == 1 ? product : Product::none;
  if (!evenly_spaced(map) || (feature_channels_last && !nhwc)) return Product::none;
  if (has_top && (channels_last ? top->stride(1) : top->stride(3)) != 1) return Product::none;
  const int64_t pixels = feature.size(0) * map.height * map.width;
  const bool by_avx2 = isa() == Isa::avx2 && dtype == Dtype::float32;
  if (by_avx2 && convolution_is_faster_avx2(cin, has_top, channels_last, pixels)) return Product::convolution;
  return product;
}

void multiply_by_vectors(
    Product product,
    const Argument& feature,
    const Argument& weight,
    const Argument& bias,
    const Argument* top,
    Mode mode,
    double gain,
    const Output& out) {
  LateralConnection call{};
  call.dtype = feature.dtype();
  call.feature = feature.map();
  call.out = out.result();
  if (top != nullptr) call.top = top->map();
  call.channels_last = call.out.stride_x != 1;
  call.feature_channels_last = call.feature.stride_x != 1;
  call.height = call.feature.height;
  call.width = call.feature.width;
  call.cin = feature.size(1);
  call.cout = weight.size(0);
  call.weight_from = weight.data();
  call.weight_row_stride = weight.stride(0);
  call.weight_column_stride = weight.stride(1);
  call.bias = static_cast<const float*>(bias.data());
  call.gain = gain;
  call.bilinear = mode == Mode::bilinear;
  const bool pairs = product == Product::bf16_pairs;
  call.operands = pairs ? divide_up(call.cin, 2) : call.cin;
  const int64_t top_height = top != nullptr ? call.top.height : 1, top_width = top != nullptr ? call.top.width : 1;
  const ResizeTable rows(top_height, call.height, mode, call.dtype);
  const ResizeTable columns(top_width, call.width, mode, call.dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  const int64_t batch = feature.size(0);
  choose_blocks(call, batch);
  const int64_t weight_units = call.channels_last ? divide_up(call.cout, panel_columns) : call.cout;
  // One more cache line of padding: rows a power of two of bytes apart, of which a tile reads several at once, would
  // share one set of L1.
  constexpr int64_t cache_line = 64 / operand_bytes;
  const int64_t padded = round_up(call.operands, cache_line) + cache_line;
  call.weight_line = call.channels_last ? call.operands * panel_columns : padded;
  Scratch packed_weight(weight_units * call.weight_line * operand_bytes);
  call.weight = packed_weight.data();
#if defined(__x86_64__)
  const auto pack = pairs ? &avx512bf16::lateral_connection_weight : FPN_FMA_KERNEL(lateral_connection_weight);
  const auto multiply = pairs ? &avx512bf16::lateral_connection_blocks : FPN_FMA_KERNEL(lateral_connection_blocks);
  run_units(pack, call, weight_units, call.weight_line, 0);
  run_units(multiply, call, batch * call.blocks, call.block * call.cout, scratch_bytes(call));
#endif
}

// Returns false, and writes nothing, if the call is left to PyTorch.
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
  const bool channels_last = out.result().stride_x != 1;
  if (out.numel() == 0 || feature.numel() == 0) return false;
  if (top != nullptr) top->check_pixels();
  const Product product = choose_product(feature, cout, top, channels_last);
  if (product == Product::none || product == Product::convolution) return false;
  if (product == Product::amx_tiles) {
    lateral_connection_amx(feature, weight, bias, top, mode, gain, out);
  } else {
    multiply_by_vectors(product, feature, weight, bias, top, mode, gain, out);
  }
  return true;
}

// The product that computes a call whose result is NHWC (channels_last) or NCHW: a name of isa.h.  "convolution" or "":
// lateral_connection returns false.
std::string lateral_connection_path(
    const Tensor& feature_tensor,
    const Tensor& weight_tensor,
    const std::optional<Tensor>& top_tensor,
    bool channels_last) {
  const Argument feature("feature", feature_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument weight("weight", weight_tensor, {any, feature.size(1)}, feature);
  const Optional top("top", top_tensor, {feature.size(0), weight.size(0), any, any}, feature);
  if (top.get() != nullptr && feature.numel() != 0 && weight.size(0) != 0) top.get()->check_pixels();
  return name_of(choose_product(feature, weight.size(0), top.get(), channels_last));
}

}  // namespace

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  // bias: float32, contiguous.
  m.def(
      "lateral_connection(Tensor feature, Tensor weight, Tensor bias, Tensor? top, int mode, float gain, "
      "Tensor(a!) out) -> bool");
  m.def("lateral_connection_path(Tensor feature, Tensor weight, Tensor? top, bool channels_last) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("lateral_connection", TORCH_BOX(&fpn::cpu::lateral_connection));
  m.impl("lateral_connection_path", TORCH_BOX(&fpn::cpu::lateral_connection_path));
}
