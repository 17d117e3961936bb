// grad_input = factor * grad and grad_factor = sum of grad * input in one pass.  Each row has its own sum, which are
// added in a fixed order in float64, so that the result does not depend on the number of threads.

#include <vector>

#include "../isa.h"
#include "../layout.h"
#include "../parallel.h"
#include "backward_kernel.h"

namespace fpn::cpu {

void weighted_merge_backward(
    const Tensor& grad_tensor,
    const Tensor& input_tensor,
    const Tensor& factor_tensor,
    Tensor grad_input_tensor,
    Tensor grad_factor_tensor) {
  const Argument grad("grad", grad_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument input("input", input_tensor, grad.sizes(), grad);
  const Argument factor("factor", factor_tensor, {}, grad, {Dtype::float32, Dtype::float64});
  const Output grad_input("grad_input", grad_input_tensor, grad.sizes(), grad);
  const Output grad_factor("grad_factor", grad_factor_tensor, {}, grad, Dtype::float64);
  grad_input.check_apart({&grad, &input, &factor, &grad_factor});
  grad_factor.check_apart({&grad, &input, &factor});
  WeightedMergeBackward call{};
  call.dtype = grad.dtype();
  call.grad = grad.map();
  call.input = input.map();
  call.grad_input = grad_input.result();
  call.channels = grad.size(1);
  call.factor = factor.number(0);
  call.channels_last = call.grad_input.stride_x != 1;
  call.streaming = may_stream(grad_input);
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
  run_units(FPN_SIMD_KERNEL(weighted_merge_backward_rows), call, units, elements, scratch);
  double total = 0;
  for (const double sum : sums) total += sum;
  *static_cast<double*>(grad_factor.data()) = total;
}

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  m.def(
      "weighted_merge_backward(Tensor grad, Tensor input, Tensor factor, Tensor(a!) grad_input, "
      "Tensor(b!) grad_factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("weighted_merge_backward", TORCH_BOX(&fpn::cpu::weighted_merge_backward));
}
