// Launches kernels on the tensor's device and PyTorch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace fpn::cuda {

using torch::stable::Tensor;

// Looked up at run time, because this library also loads under a CPU build of PyTorch.  The function is part of the
// stable ABI; libtorch_cuda.so is loaded if a CUDA tensor exists.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "this PyTorch has no CUDA");
  void* stream = nullptr;
  // torch 2.11 has no STABLE_TORCH_ERROR_CODE_CHECK.
  STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS, "no current stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Two CTAs of 256 threads with up to 128 registers fit an SM; most kernels use far fewer registers.
constexpr int block_threads = 256;

template <class Body, class Index>
__global__ void __launch_bounds__(block_threads, 2) run_items(const __grid_constant__ Body body, Index items) {
  const Index item = static_cast<Index>(blockIdx.x) * block_threads + threadIdx.x;
  if (item < items) body(item);
}

// The `launch` argument of run() in upsample_add.h and upsample_add_backward.h.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  template <class Body>
  void operator()(const Body& body, int64_t items) const {
    if (items == 0) return;
    const int64_t blocks = (items + block_threads - 1) / block_threads;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "expected a map that one launch covers, got too many elements");
    using Index = decltype(index_of(&Body::operator()));
    run_items<<<static_cast<unsigned>(blocks), block_threads, 0, stream_>>>(body, static_cast<Index>(items));
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
  }

 private:
  template <class Body, class Index>
  static Index index_of(void (Body::*)(Index) const);

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fpn::cuda
