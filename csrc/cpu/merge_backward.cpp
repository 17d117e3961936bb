// grad_top and grad_bias in one pass over grad.  The sums of each row are kept apart and added up in one order, in
// float64, so that the result does not depend on how many threads there are.

#include <vector>

#include "../operators.h"
#include "upsample_add_backward.h"

namespace fpn::cpu {

namespace {

// Adds up the sums of the units: `planes` lines of `rows` sums in NCHW, `rows` lines of `channels` sums in NHWC.
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
    const Tensor& grad,
    const std::optional<Tensor>& own,
    int64_t mode,
    double gain,
    Tensor grad_top,
    Tensor grad_bias) {
  STD_TORCH_CHECK(
      !own || (own->scalar_type() == grad_top.scalar_type() && same_strides(*own, grad_top)),
      "own: expected the dtype and the strides of grad_top");
  STD_TORCH_CHECK(
      grad_bias.scalar_type() == torch::headeronly::ScalarType::Double && grad_bias.is_contiguous(),
      "grad_bias: expected a contiguous float64 tensor");
  bool channels_last = false;
  const int64_t channels = grad.size(1);
  const int64_t units = backward_units(grad, grad_top, channels_last);
  std::vector<double> sums(units * (channels_last ? channels : 1));
  gather_gradient(
      grad, own ? own->const_data_ptr() : nullptr, static_cast<Mode>(mode), gain, grad_top, sums.data());
  const std::vector<double> totals = per_channel(sums, grad.size(0), channels, grad_top.size(2), channels_last);
  double* out = static_cast<double*>(grad_bias.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) out[c] = gain * totals[c];
}

}  // namespace fpn::cpu
