// The operators on CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

namespace fpn::cuda {

using torch::stable::Tensor;

void upsample_add(const Tensor& top, const Tensor& lateral, int64_t mode, double gain, Tensor out);
void upsample_add_backward(const Tensor& grad, int64_t mode, double gain, Tensor grad_top);

// The reason why a device cannot run the compiled kernels (e.g. another architecture, too old a driver), or "".
std::string refusal(int64_t device);

}  // namespace fpn::cuda
