// grad_input = factor * grad and grad_factor = sum of grad * input in one pass.  The sums of each row are kept apart
// and added up in one order, in float64, so that the result does not depend on how many threads there are.

#include <vector>

#include "../operators.h"
#include "capability.h"
#include "maps.h"

namespace fpn::cpu {

void weighted_merge_backward(
    const Tensor& grad, const Tensor& input, const Tensor& factor, Tensor grad_input, Tensor grad_factor) {
  STD_TORCH_CHECK(
      grad_factor.scalar_type() == torch::headeronly::ScalarType::Double && grad_factor.numel() == 1,
      "grad_factor: expected one float64 number");
  WeightedMergeBackward call{};
  call.dtype = dtype_of(grad);
  call.grad = map_of(grad);
  call.input = map_of(input);
  call.grad_input = result_of(grad_input);
  call.channels = grad.size(1);
  call.factor = number_of(factor, 0);
  call.channels_last = call.grad_input.stride_x != 1;
  call.streaming = may_stream(grad_input, call.dtype);
  const int64_t rows = grad.size(0) * call.grad.height;
  int64_t units = call.channels_last ? rows : rows * call.channels;
  int64_t elements = call.grad.width * (call.channels_last ? call.channels : 1);
  int64_t scratch = 2 * line_bytes(elements, element_size(call.dtype));
  if (!call.channels_last && planes_are_rows(grad) && planes_are_rows(input)) {
    units = grad.size(0) * call.channels;
    elements = call.grad.height * call.grad.width;
    scratch = 0;
    make_rows_of_planes(call.grad, elements);
    make_rows_of_planes(call.input, elements);
    make_rows_of_planes(call.grad_input, elements);
    call.grad.height = units;
    call.grad.width = elements;
    call.channels = 1;
  }
  std::vector<double> sums(units);
  call.sums = sums.data();
  run_units(FPN_CHOOSE(weighted_merge_backward_rows), call, units, elements, scratch);
  double total = 0;
  for (const double sum : sums) total += sum;
  *static_cast<double*>(grad_factor.mutable_data_ptr()) = total;
}

}  // namespace fpn::cpu
