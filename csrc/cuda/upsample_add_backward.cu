#include "upsample_add_backward.h"

#include "../tensors.h"
#include "launch.h"
#include "operators.h"

namespace fpn::cuda {

void upsample_add_backward(const Tensor& grad_tensor, int64_t mode, double gain, Tensor grad_top_tensor) {
  const Argument grad("grad", grad_tensor, {any, any, any, any}, aoti_torch_device_type_cuda());
  const Output grad_top("grad_top", grad_top_tensor, {grad.size(0), grad.size(1), any, any}, grad);
  grad_top.check_apart({&grad});
  grad.check_pixels();
  grad_top.check_pixels();
  const UpsampleAddBackward call{
      grad.dtype(),     grad.map(),       grad_top.result(), grad.size(0), grad.size(1),
      grad_top.size(2), grad_top.size(3), mode_of(mode),     gain};
  if (grad_top.numel() == 0) return;
  const Path path = path_of(call);
  const Launcher launch(grad_tensor);
  switch (call.dtype) {
    case Dtype::float16: return run<Half>(call, path, launch);
    case Dtype::bfloat16: return run<BFloat16>(call, path, launch);
    case Dtype::float32: return run<float>(call, path, launch);
    case Dtype::float64: return run<double>(call, path, launch);
  }
}

}  // namespace fpn::cuda
