#include "upsample_add_backward.h"

#include "../common/tensors.h"
#include "launch.h"
#include "operators.h"

namespace fpn::cuda {

void upsample_add_backward(const Tensor& grad, int64_t mode, double gain, Tensor grad_top) {
  if (grad_top.numel() == 0) return;
  const UpsampleAddBackward call{
      dtype_of(grad),   map_of(grad),     result_of(grad_top),     grad.size(0), grad.size(1),
      grad_top.size(2), grad_top.size(3), static_cast<Mode>(mode), gain};
  const Path path = path_of(call);
  const Launcher launch(grad);
  switch (call.dtype) {
    case Dtype::float16: return run<Half>(call, path, launch);
    case Dtype::bfloat16: return run<BFloat16>(call, path, launch);
    case Dtype::float32: return run<float>(call, path, launch);
    case Dtype::float64: return run<double>(call, path, launch);
  }
}

}  // namespace fpn::cuda
