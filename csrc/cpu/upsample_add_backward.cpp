#include "upsample_add_backward.h"

#include "../operators.h"
#include "capability.h"

namespace fpn::cpu {

int64_t backward_units(const Tensor& grad, const Tensor& grad_top, bool& channels_last) {
  channels_last = grad_top.stride(3) != 1;
  return grad.size(0) * grad_top.size(2) * (channels_last ? 1 : grad.size(1));
}

void gather_gradient(
    const Tensor& grad, const void* own, Mode mode, double gain, const Tensor& grad_top, double* bias_sums) {
  const Dtype dtype = dtype_of(grad);
  UpsampleAddBackward call{};
  call.dtype = dtype;
  call.grad = map_of(grad);
  call.grad_top = result_of(grad_top);
  call.own = own;
  call.channels = grad.size(1);
  call.top_height = grad_top.size(2);
  call.top_width = grad_top.size(3);
  const AdjointTable rows(call.top_height, call.grad.height, mode, dtype);
  const AdjointTable columns(call.top_width, call.grad.width, mode, dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  call.gain = gain;
  call.bilinear = mode == Mode::bilinear;
  call.bias_sums = bias_sums;
  const int64_t units = backward_units(grad, grad_top, call.channels_last);
  const int64_t row = call.grad.width * (call.channels_last ? call.channels : 1);
  const int64_t element = element_size(dtype);
  int64_t scratch = line_bytes(call.grad.width, 8) * 2;
  if (call.channels_last) scratch = call.grad.stride_c == 1 ? 0 : line_bytes(row * call.rows.longest, element);
  const int64_t elements = row * std::max<int64_t>(1, call.grad.height / call.top_height);
  run_units(FPN_CHOOSE(upsample_add_backward_rows), call, units, elements, scratch);
}

void upsample_add_backward(const Tensor& grad, int64_t mode, double gain, Tensor grad_top) {
  gather_gradient(grad, nullptr, static_cast<Mode>(mode), gain, grad_top, nullptr);
}

}  // namespace fpn::cpu
