// grad_top and grad_bias in one pass over grad.  Each row has its own sums, which are added in a fixed order in
// float64, so that the result does not depend on the number of threads.

#include <vector>

#include "backward.h"

namespace fpn::cpu {

namespace {

// Adds the sums of the units: [batch][channels][rows] in NCHW, [batch][rows][channels] in NHWC.
std::vector<double> per_channel(
    const std::vector<double>& sums, int64_t batch, int64_t channels, int64_t rows, bool channels_last) {
  std::vector<double> totals(channels, 0.0);
  for (int64_t n = 0; n < batch; ++n) {
    if (channels_last) {
      for (int64_t y = 0; y < rows; ++y) {
        const double* line = sums.data() + (n * rows + y) * channels;
        for (int64_t c = 0; c < channels; ++c) totals[c] += line[c];
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const double* line = sums.data() + (n * channels + c) * rows;
        for (int64_t y = 0; y < rows; ++y) totals[c] += line[y];
      }
    }
  }
  return totals;
}

}  // namespace

void merge_backward(
    const Tensor& grad_tensor,
    const std::optional<Tensor>& upstream_tensor,
    int64_t mode,
    double gain,
    Tensor grad_top_tensor,
    Tensor grad_bias_tensor) {
  const Argument grad("grad", grad_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const int64_t channels = grad.size(1);
  const Output grad_top("grad_top", grad_top_tensor, {grad.size(0), channels, any, any}, grad);
  const Optional upstream("upstream", upstream_tensor, {grad.size(0), channels, grad_top.size(2), grad_top.size(3)}, grad);
  const Output grad_bias("grad_bias", grad_bias_tensor, {channels}, grad, Dtype::float64);
  grad_bias.check_dense_vector();
  grad_top.check_apart({&grad, upstream.get(), &grad_bias});
  grad_bias.check_apart({&grad, upstream.get()});
  STD_TORCH_CHECK(
      upstream.get() == nullptr || grad_top.has_strides_of(*upstream.get()), "upstream: expected the strides of grad_top");
  grad.check_pixels();
  grad_top.check_pixels();
  const bool channels_last = grad_top.result().stride_x != 1;
  const int64_t units = backward_units(grad, grad_top);
  std::vector<double> sums(units * (channels_last ? channels : 1));
  gather_gradient(grad, upstream.get(), mode_of(mode), gain, grad_top, sums.data());
  const std::vector<double> totals = per_channel(sums, grad.size(0), channels, grad_top.size(2), channels_last);
  double* out = static_cast<double*>(grad_bias.data());
  for (int64_t c = 0; c < channels; ++c) out[c] = gain * totals[c];
}

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  // upstream: the rest of the gradient of top, with the strides of grad_top.
  m.def(
      "merge_backward(Tensor grad, Tensor? upstream, int mode, float gain, Tensor(a!) grad_top, Tensor(b!) grad_bias) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("merge_backward", TORCH_BOX(&fpn::cpu::merge_backward));
}
