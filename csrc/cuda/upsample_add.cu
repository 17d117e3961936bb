#include "upsample_add.h"

#include "../tensors.h"
#include "launch.h"
#include "operators.h"

namespace fpn::cuda {

void upsample_add(
    const Tensor& top_tensor, const Tensor& lateral_tensor, int64_t mode, double gain, Tensor out_tensor) {
  const Argument lateral("lateral", lateral_tensor, {any, any, any, any}, aoti_torch_device_type_cuda());
  const Argument top("top", top_tensor, {lateral.size(0), lateral.size(1), any, any}, lateral);
  const Output out("out", out_tensor, lateral.sizes(), lateral);
  const UpsampleAdd call{
      lateral.dtype(), top.map(),       lateral.map(), out.result(),
      lateral.size(0), lateral.size(1), mode_of(mode), gain};
  out.check_apart({&top, &lateral});
  if (out.numel() == 0) return;
  top.check_pixels();
  const Path path = path_of(call);
  const Launcher launch(lateral_tensor);
  switch (call.dtype) {
    case Dtype::float16: return run<Half>(call, path, launch);
    case Dtype::bfloat16: return run<BFloat16>(call, path, launch);
    case Dtype::float32: return run<float>(call, path, launch);
    case Dtype::float64: return run<double>(call, path, launch);
  }
}

}  // namespace fpn::cuda
