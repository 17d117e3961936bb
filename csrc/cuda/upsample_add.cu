#include "upsample_add.h"

#include "../common/tensors.h"
#include "launch.h"
#include "operators.h"

namespace fpn::cuda {

void upsample_add(const Tensor& top, const Tensor& lateral, int64_t mode, double gain, Tensor out) {
  if (lateral.numel() == 0) return;
  const UpsampleAdd call{
      dtype_of(lateral), map_of(top),     map_of(lateral),         result_of(out),
      lateral.size(0),   lateral.size(1), static_cast<Mode>(mode), gain};
  const Path path = path_of(call);
  const Launcher launch(lateral);
  switch (call.dtype) {
    case Dtype::float16: return run<Half>(call, path, launch);
    case Dtype::bfloat16: return run<BFloat16>(call, path, launch);
    case Dtype::float32: return run<float>(call, path, launch);
    case Dtype::float64: return run<double>(call, path, launch);
  }
}

}  // namespace fpn::cuda
