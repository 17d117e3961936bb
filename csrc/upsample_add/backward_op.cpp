#include "backward.h"

#include "../isa.h"
#include "../parallel.h"
#include "../resize_table.h"
#include "backward_kernel.h"

namespace fpn::cpu {

int64_t backward_units(const Argument& grad, const Output& grad_top) {
  return grad.size(0) * grad_top.size(2) * (grad_top.result().stride_x == 1 ? grad.size(1) : 1);
}

void gather_gradient(
    const Argument& grad, const Argument* upstream, Mode mode, double gain, const Output& grad_top, double* bias_sums) {
  UpsampleAddBackward call{};
  call.dtype = grad.dtype();
  call.grad = grad.map();
  call.grad_top = grad_top.result();
  call.channels_last = call.grad_top.stride_x != 1;
  call.upstream = upstream == nullptr ? nullptr : upstream->data();
  call.channels = grad.size(1);
  call.top_height = grad_top.size(2);
  call.top_width = grad_top.size(3);
  const AdjointTable rows(call.top_height, call.grad.height, mode, call.dtype);
  const AdjointTable columns(call.top_width, call.grad.width, mode, call.dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  call.gain = gain;
  call.bilinear = mode == Mode::bilinear;
  call.bias_sums = bias_sums;
  const int64_t units = backward_units(grad, grad_top);
  const int64_t row = call.grad.width * (call.channels_last ? call.channels : 1);
  const int64_t element = element_size(call.dtype);
  int64_t scratch = line_bytes(call.grad.width, 8) * 2;
  if (call.channels_last) scratch = call.grad.stride_c == 1 ? 0 : line_bytes(row * call.rows.longest, element);
  const int64_t elements = row * std::max<int64_t>(1, call.grad.height / call.top_height);
  run_units(FPN_SIMD_KERNEL(upsample_add_backward_rows), call, units, elements, scratch);
}

void upsample_add_backward(const Tensor& grad_tensor, int64_t mode, double gain, Tensor grad_top_tensor) {
  const Argument grad("grad", grad_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Output grad_top("grad_top", grad_top_tensor, {grad.size(0), grad.size(1), any, any}, grad);
  grad_top.check_apart({&grad});
  grad.check_pixels();
  grad_top.check_pixels();
  gather_gradient(grad, nullptr, mode_of(mode), gain, grad_top, nullptr);
}

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  m.def("upsample_add_backward(Tensor grad, int mode, float gain, Tensor(a!) grad_top) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("upsample_add_backward", TORCH_BOX(&fpn::cpu::upsample_add_backward));
}
