// Registers the CUDA kernels, in a library built with nvcc.

#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  m.def("cuda_refusal(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CUDA, m) {
  m.impl("upsample_add", TORCH_BOX(&fpn::cuda::upsample_add));
  m.impl("upsample_add_backward", TORCH_BOX(&fpn::cuda::upsample_add_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&fpn::cuda::refusal));
}
