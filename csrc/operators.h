// The operators of the compiled library, `torch.ops.fpn_kernels_native.*`: schemas in library.cpp.
//
// Results arrive allocated (fpn_kernels/backends/layouts.py).  Each operator checks dtype, device, sizes and strides of
// every tensor before it takes a pointer (common/tensors.h): a wrong argument raises RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fpn::cpu {

using torch::stable::Tensor;

void upsample_add(const Tensor& top, const Tensor& lateral, int64_t mode, double gain, Tensor out);
void upsample_add_backward(const Tensor& grad, int64_t mode, double gain, Tensor grad_top);
// Whether it served: where not, nothing was written.  bias is float32, its numbers side by side.
bool lateral_connection(
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const std::optional<Tensor>& top,
    int64_t mode,
    double gain,
    Tensor out);
// weights are float32 or float64: the factors or, with relu, what they are made of as relu(w) / (sum of relu(w) + eps).
void weighted_merge(
    const Tensor& first,
    const Tensor& second,
    const std::optional<Tensor>& third,
    const Tensor& weights,
    bool relu,
    double eps,
    int64_t mode,
    Tensor out);
void weighted_merge_backward(
    const Tensor& grad, const Tensor& input, const Tensor& factor, Tensor grad_input, Tensor grad_factor);
// own, where there is one, has the strides of grad_top.
void merge_backward(
    const Tensor& grad,
    const std::optional<Tensor>& own,
    int64_t mode,
    double gain,
    Tensor grad_top,
    Tensor grad_bias);
// Whether it served: where not, nothing was written.  out is dense, in either layout whatever the feature's.
bool output_conv(const Tensor& feature, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out);
// Whether it served: where not, what was written means nothing.  grad_weight is dense, grad_bias float64.
bool output_conv_backward_weight(
    const Tensor& grad, const Tensor& feature, Tensor grad_weight, std::optional<Tensor> grad_bias);
// out = source, in out's own layout: dense NCHW or NHWC.
void reorder(const Tensor& source, Tensor out);

}  // namespace fpn::cpu
