#include <cmath>
#include <optional>

#include "../isa.h"
#include "../layout.h"
#include "../parallel.h"
#include "../resize_table.h"
#include "kernel.h"

namespace fpn::cpu {

namespace {

int64_t scratch_bytes(const WeightedMerge& call) {
  const int64_t element = element_size(call.dtype);
  int64_t bytes = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const WeightedMap& input = call.inputs[i];
    const bool blended = input.resized && call.bilinear;
    if (call.channels_last) {
      const int64_t line = input.map.stride_c == 1 ? 0 : line_bytes(input.map.width * call.channels, element);
      bytes += blended ? 2 * line + line_bytes(call.channels, 8) : line;
    } else if (input.resized) {
      bytes += held_rows_bytes(call.width, input.map.width) + (blended ? line_bytes(call.width, 8) : 0);
    } else {
      bytes += line_bytes(call.width, element);
    }
  }
  return bytes;
}

// Turns the weights into factors whose sum is one.  Each step is rounded to A, like PyTorch's.
template <class A>
void normalize(WeightedMerge& call, double eps) {
  A positive[3], total = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const A weight = static_cast<A>(call.inputs[i].factor);
    positive[i] = weight <= 0 ? 0 : weight;  // NaN stays NaN
    total += positive[i];
  }
  total += static_cast<A>(eps);
  for (int64_t i = 0; i < call.count; ++i) call.inputs[i].factor = positive[i] / total;
}

}  // namespace

void weighted_merge(
    const Tensor& first_tensor,
    const Tensor& second_tensor,
    const std::optional<Tensor>& third_tensor,
    const Tensor& weights_tensor,
    bool relu,
    double eps,
    int64_t mode_number,
    Tensor out_tensor) {
  const Mode mode = mode_of(mode_number);
  const Argument first("first", first_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument second("second", second_tensor, {first.size(0), first.size(1), any, any}, first);
  const Optional third("third", third_tensor, {first.size(0), first.size(1), any, any}, first);
  const int64_t count = third.get() == nullptr ? 2 : 3;
  const Argument weights("weights", weights_tensor, {count}, first, {Dtype::float32, Dtype::float64});
  const Output out("out", out_tensor, first.sizes(), first);
  out.check_apart({&first, &second, third.get(), &weights});
  STD_TORCH_CHECK(eps >= 0 && eps < INFINITY, "eps: expected a finite number of at least 0, got ", eps);
  const Dtype dtype = first.dtype();
  const int64_t batch = first.size(0), height = first.size(2), width = first.size(3);
  const Argument* inputs[3] = {&first, &second, third.get()};
  WeightedMerge call{};
  call.dtype = dtype;
  call.out = out.result();
  call.channels = first.size(1);
  call.height = height;
  call.width = width;
  call.bilinear = mode == Mode::bilinear;
  call.channels_last = call.out.stride_x != 1;
  call.streaming = may_stream(out);
  if (out.numel() == 0) return;
  std::optional<ResizeTable> tables[6];
  bool flat = true;
  while (call.count < count) {
    WeightedMap& input = call.inputs[call.count];
    inputs[call.count]->check_pixels();
    input.map = inputs[call.count]->map();
    input.factor = weights.number(call.count);
    input.resized = input.map.height != height || input.map.width != width;
    if (input.resized) {
      std::optional<ResizeTable>*rows = tables + 2 * call.count, *columns = rows + 1;
      rows->emplace(input.map.height, height, mode, dtype);
      columns->emplace(input.map.width, width, mode, dtype);
      input.rows = (*rows)->axis();
      input.columns = (*columns)->axis();
    }
    flat = flat && !input.resized && planes_are_rows(*inputs[call.count]);
    ++call.count;
  }
  if (relu) (dtype == Dtype::float64 ? normalize<double> : normalize<float>)(call, eps);
  if (!call.channels_last && flat) {
    const int64_t plane = height * width;
    for (int64_t i = 0; i < call.count; ++i) make_rows_of_planes(call.inputs[i].map, plane);
    make_rows_of_planes(call.out, plane);
    call.height = batch * call.channels;
    call.width = plane;
    call.channels = 1;
    run_units(FPN_SIMD_KERNEL(weighted_merge_rows), call, call.height, plane, 0);
    return;
  }
  const int64_t units = call.channels_last ? batch * height : batch * call.channels * height;
  const int64_t elements = call.channels_last ? width * call.channels : width;
  run_units(FPN_SIMD_KERNEL(weighted_merge_rows), call, units, elements, scratch_bytes(call));
}

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  // weights: float32 or float64.  With relu the factors are relu(w) / (sum of relu(w) + eps), else the weights.
  m.def(
      "weighted_merge(Tensor first, Tensor second, Tensor? third, Tensor weights, bool relu, float eps, int mode, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("weighted_merge", TORCH_BOX(&fpn::cpu::weighted_merge));
}
