#include <optional>

#include "../operators.h"
#include "capability.h"
#include "maps.h"
#include "tables.h"

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

// Makes the factors, which are weights so far, add up to one: each step rounded to A, as PyTorch's are.
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
    const Tensor& first,
    const Tensor& second,
    const std::optional<Tensor>& third,
    const Tensor& weights,
    bool relu,
    double eps,
    int64_t mode,
    Tensor out) {
  const Dtype dtype = dtype_of(first);
  const int64_t batch = first.size(0), height = first.size(2), width = first.size(3);
  const Tensor* inputs[3] = {&first, &second, third.has_value() ? &third.value() : nullptr};
  WeightedMerge call{};
  call.dtype = dtype;
  call.out = result_of(out);
  call.channels = first.size(1);
  call.height = height;
  call.width = width;
  call.bilinear = static_cast<Mode>(mode) == Mode::bilinear;
  call.channels_last = call.out.stride_x != 1;
  call.streaming = may_stream(out, dtype);
  std::optional<ForwardTable> tables[6];
  bool flat = true;
  while (call.count < 3 && inputs[call.count] != nullptr) {
    WeightedMap& input = call.inputs[call.count];
    input.map = map_of(*inputs[call.count]);
    input.factor = number_of(weights, call.count);
    input.resized = input.map.height != height || input.map.width != width;
    if (input.resized) {
      std::optional<ForwardTable>*rows = tables + 2 * call.count, *columns = rows + 1;
      rows->emplace(input.map.height, height, static_cast<Mode>(mode), dtype);
      columns->emplace(input.map.width, width, static_cast<Mode>(mode), dtype);
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
    run_units(FPN_CHOOSE(weighted_merge_rows), call, call.height, plane, 0);
    return;
  }
  const int64_t units = call.channels_last ? batch * height : batch * call.channels * height;
  const int64_t elements = call.channels_last ? width * call.channels : width;
  run_units(FPN_CHOOSE(weighted_merge_rows), call, units, elements, scratch_bytes(call));
}

}  // namespace fpn::cpu
