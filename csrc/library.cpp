// Declares the operators of the compiled library and registers their kernels, through the LibTorch stable ABI.
//
// A namespace of its own: torch.ops.fpn_kernels.* are the differentiable operators, defined in Python; they call
// these as one of their backends.

#include <torch/csrc/stable/library.h>

#include "cpu/capability.h"
#include "operators.h"

STABLE_TORCH_LIBRARY(fpn_kernels_native, m) {
  m.def("upsample_add(Tensor top, Tensor lateral, int mode, float gain, Tensor(a!) out) -> ()");
  m.def("upsample_add_backward(Tensor grad, int mode, float gain, Tensor(a!) grad_top) -> ()");
  m.def(
      "merge_backward(Tensor grad, Tensor? own, int mode, float gain, Tensor(a!) grad_top, Tensor(b!) grad_bias) -> ()");
  m.def(
      "weighted_merge(Tensor first, Tensor second, Tensor? third, Tensor weights, bool relu, float eps, int mode, "
      "Tensor(a!) out) -> ()");
  m.def(
      "weighted_merge_backward(Tensor grad, Tensor input, Tensor factor, Tensor(a!) grad_input, "
      "Tensor(b!) grad_factor) -> ()");
  m.def(
      "lateral_connection(Tensor feature, Tensor weight, Tensor bias, Tensor? top, int mode, float gain, "
      "Tensor(a!) out) -> bool");
  m.def("output_conv(Tensor feature, Tensor weight, Tensor? bias, Tensor(a!) out) -> bool");
  m.def(
      "output_conv_backward_weight(Tensor grad, Tensor feature, Tensor(a!) grad_weight, Tensor(b!)? grad_bias) -> bool");
  m.def("reorder(Tensor source, Tensor(a!) out) -> ()");
  m.def("limit_level(int ceiling) -> int");
  m.def("multiplies_by_tiles() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("upsample_add", TORCH_BOX(&fpn::cpu::upsample_add));
  m.impl("upsample_add_backward", TORCH_BOX(&fpn::cpu::upsample_add_backward));
  m.impl("lateral_connection", TORCH_BOX(&fpn::cpu::lateral_connection));
  m.impl("output_conv", TORCH_BOX(&fpn::cpu::output_conv));
  m.impl("output_conv_backward_weight", TORCH_BOX(&fpn::cpu::output_conv_backward_weight));
  m.impl("merge_backward", TORCH_BOX(&fpn::cpu::merge_backward));
  m.impl("weighted_merge", TORCH_BOX(&fpn::cpu::weighted_merge));
  m.impl("weighted_merge_backward", TORCH_BOX(&fpn::cpu::weighted_merge_backward));
  m.impl("reorder", TORCH_BOX(&fpn::cpu::reorder));
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("limit_level", TORCH_BOX(&fpn::cpu::limit_level));
  m.impl("multiplies_by_tiles", TORCH_BOX(&fpn::cpu::multiplies_by_tiles));
}
