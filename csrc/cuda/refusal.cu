#include <cuda_runtime.h>

#include "operators.h"

namespace fpn::cuda {

namespace {

__global__ void probe() {}

}  // namespace

std::string refusal(int64_t device) {
  if (device < 0 || device > INT32_MAX) return cudaGetErrorString(cudaErrorInvalidDevice);
  // Permits the calls below while a graph is captured.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device));
  if (error == cudaSuccess) {
    // Loads the kernel without a launch; fails if no code for the device was compiled.
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(before);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // clears the error, which is returned
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace fpn::cuda
