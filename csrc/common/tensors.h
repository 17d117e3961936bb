// From the stable ABI's tensors to what the kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "maps.h"

namespace fpn {

using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "expected float16, bfloat16, float32 or float64");
  }
}

inline Map map_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {
      tensor.const_data_ptr(), tensor.size(2), tensor.size(3), strides[0], strides[1], strides[2], strides[3]};
}

// Of two tensors with as many dimensions.
inline bool same_strides(const Tensor& left, const Tensor& right) {
  // In torch 2.11 the stable ABI's lists of numbers have no operator==.
  const auto ours = left.strides(), theirs = right.strides();
  return std::equal(ours.begin(), ours.end(), theirs.begin());
}

inline Result result_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  STD_TORCH_CHECK(strides[3] == 1 || strides[1] == 1, "out: expected a dense NCHW or NHWC tensor");
  return {tensor.mutable_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace fpn
