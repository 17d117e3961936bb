#include <cuda_runtime.h>

#include "operators.h"

namespace fpn::cuda {

namespace {

__global__ void probe() {}

}  // namespace

std::string refusal(int64_t device) {
  if (device < 0 || device > INT32_MAX) return cudaGetErrorString(cudaErrorInvalidDevice);
  // A graph may be under capture: no reason not to answer.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device));
  if (error == cudaSuccess) {
    // Loads the kernel, which fails where no code for the device was compiled; launches nothing.
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(before);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // cleared: it has been told
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace fpn::cuda
