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
      "merge_backward(Tensor grad, int mode, float gain, Tensor(a!) grad_top, Tensor(b!) grad_bias) -> ()");
  m.def(
      "lateral_connection(Tensor feature, Tensor weight, Tensor bias, Tensor? top, int mode, float gain, "
      "Tensor(a!) out) -> bool");
  m.def("reorder(Tensor source, Tensor(a!) out) -> ()");
  m.def("limit_level(int ceiling) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("upsample_add", TORCH_BOX(&fpn::cpu::upsample_add));
  m.impl("upsample_add_backward", TORCH_BOX(&fpn::cpu::upsample_add_backward));
  m.impl("lateral_connection", TORCH_BOX(&fpn::cpu::lateral_connection));
  m.impl("merge_backward", TORCH_BOX(&fpn::cpu::merge_backward));
  m.impl("reorder", TORCH_BOX(&fpn::cpu::reorder));
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("limit_level", TORCH_BOX(&fpn::cpu::limit_level));
}
