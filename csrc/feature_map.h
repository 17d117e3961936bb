// Tensors as plain structures, for kernels on either device.
#pragma once

#include <cstdint>

namespace fpn {

enum class Dtype : int32_t { float16, bfloat16, float32, float64 };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A map [N, C, H, W] of any strides, in elements.
struct Map {
  const void* data;
  int64_t height, width;
  int64_t stride_n, stride_c, stride_y, stride_x;
};

// A dense result: stride_x is 1 (NCHW) or stride_c is 1 (NHWC).
struct Result {
  void* data;
  int64_t stride_n, stride_c, stride_y, stride_x;
};

}  // namespace fpn
