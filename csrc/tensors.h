// Checks the tensors of a call and converts them to plain structures.
//
// The operators are public, so an op.cpp takes every pointer from an Argument (40 ns each, Zen 3).  A wrong argument
// raises RuntimeError.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <string>

#include "feature_map.h"
#include "resampling.h"

namespace fpn {

using torch::stable::Tensor;

// An axis of any size.
constexpr int64_t any = -1;

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Keeps products of a few sizes and an element's bytes below 2^63.
constexpr int64_t max_elements = int64_t{1} << 56;

// Calls a getter of the stable ABI.  torch 2.11 has no STABLE_TORCH_ERROR_CODE_CHECK.
template <class Number>
Number property(const Tensor& tensor, AOTITorchError (*getter)(AtenTensorHandle, Number*)) {
  Number number{};
  STD_TORCH_CHECK(getter(tensor.get(), &number) == AOTI_TORCH_SUCCESS, "expected a strided tensor with memory");
  return number;
}

inline Mode mode_of(int64_t number) {
  STD_TORCH_CHECK(
      number >= 0 && number <= static_cast<int64_t>(Mode::bilinear),
      "mode: expected 0 (nearest), 1 (nearest-exact) or 2 (bilinear), got ", number);
  return static_cast<Mode>(number);
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64"};
  return names[static_cast<int32_t>(dtype)];
}

template <class Numbers>
std::string text_of(const Numbers& numbers) {
  std::string text;
  for (const int64_t number : numbers) {
    text += (text.empty() ? "" : ", ") + (number == any ? "any" : std::to_string(number));
  }
  return "[" + text + "]";
}

// An input of an operator.  The constructor checks its dtype, device, sizes and extent in memory.
class Argument {
 public:
  // The first argument, on a device of this type.  The others are compared with it.
  Argument(const char* name, const Tensor& tensor, Sizes sizes, int32_t device_type) : Argument(name, tensor) {
    const char* expected = device_type == aoti_torch_device_type_cpu() ? "the CPU" : "CUDA";
    STD_TORCH_CHECK(device_type_ == device_type, name, ": expected a tensor on ", expected);
    check_sizes(sizes);
    read();
  }
  // With the dtype and device of `like`.
  Argument(const char* name, const Tensor& tensor, Sizes sizes, const Argument& like)
      : Argument(name, tensor, sizes, like, {like.dtype_}) {}
  // With the device of `like` and one of these dtypes.
  Argument(
      const char* name, const Tensor& tensor, Sizes sizes, const Argument& like, std::initializer_list<Dtype> dtypes)
      : Argument(name, tensor, sizes, like, dtypes, false) {}

  Dtype dtype() const { return dtype_; }
  Sizes sizes() const { return {sizes_, static_cast<size_t>(rank_)}; }
  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis]; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const { return tensor_->is_contiguous(); }
  const void* data() const { return data_; }

  // For a 4-D argument.
  Map map() const { return {data_, size(2), size(3), stride(0), stride(1), stride(2), stride(3)}; }

  // For a map that is resized, and for the result of a resize.
  void check_pixels() const {
    STD_TORCH_CHECK(size(2) > 0 && size(3) > 0, name_, ": expected at least one pixel, got the shape ", text());
  }
  // For a vector.
  void check_dense_vector() const {
    STD_TORCH_CHECK(size(0) <= 1 || stride(0) == 1, name_, ": expected a stride of 1, got ", stride(0));
  }
  // An element of a float32 or float64 vector or scalar.
  double number(int64_t index) const {
    const int64_t at = rank_ == 0 ? 0 : index * stride(0);
    return dtype_ == Dtype::float64 ? static_cast<const double*>(data_)[at] : static_cast<const float*>(data_)[at];
  }

 protected:
  Argument(
      const char* name,
      const Tensor& tensor,
      Sizes sizes,
      const Argument& like,
      std::initializer_list<Dtype> dtypes,
      bool is_written)
      : Argument(name, tensor) {
    bool known = false;
    for (const Dtype dtype : dtypes) known = known || dtype == dtype_;
    STD_TORCH_CHECK(known, name, ": expected dtype ", name_of(*dtypes.begin()), ", got ", name_of(dtype_));
    STD_TORCH_CHECK(
        device_type_ == like.device_type_ &&
            (device_type_ == aoti_torch_device_type_cpu() ||
             tensor.get_device_index() == like.tensor_->get_device_index()),
        name, ": expected the device of ", like.name_);
    check_sizes(sizes);
    read(is_written);
  }

  std::string text() const { return text_of(sizes()); }

  const char* name_;
  void* data_ = nullptr;

 private:
  friend class Output;

  Argument(const char* name, const Tensor& tensor)
      : name_(name),
        tensor_(&tensor),
        rank_(property(tensor, &aoti_torch_get_dim)),
        sizes_(property(tensor, &aoti_torch_get_sizes)),
        strides_(property(tensor, &aoti_torch_get_strides)),
        device_type_(property(tensor, &aoti_torch_get_device_type)) {
    const int32_t dtype = property(tensor, &aoti_torch_get_dtype);
    if (dtype == aoti_torch_dtype_float32()) {
      dtype_ = Dtype::float32;
    } else if (dtype == aoti_torch_dtype_bfloat16()) {
      dtype_ = Dtype::bfloat16;
    } else if (dtype == aoti_torch_dtype_float16()) {
      dtype_ = Dtype::float16;
    } else {
      STD_TORCH_CHECK(
          dtype == aoti_torch_dtype_float64(), name, ": expected dtype float16, bfloat16, float32 or float64, got ",
          torch::headeronly::toString(tensor.scalar_type()));
      dtype_ = Dtype::float64;
    }
  }

  void check_sizes(Sizes sizes) {
    bool same = rank_ == static_cast<int64_t>(sizes.size());
    for (int64_t axis = 0; same && axis < rank_; ++axis) {
      same = sizes[axis] == any || sizes[axis] == sizes_[axis];
    }
    STD_TORCH_CHECK(same, name_, ": expected the shape ", text_of(sizes), ", got ", text());
  }

  // Checks that the storage holds all elements (it can be shrunk by `resize_`), then takes the pointer.
  void read(bool is_written = false) {
    int64_t last = 0;
    bool fits = true, empty = false;
    for (int64_t axis = 0; axis < rank_; ++axis) {
      const int64_t steps = sizes_[axis] > 0 ? sizes_[axis] - 1 : 0;
      int64_t reach = 0;
      empty = empty || sizes_[axis] == 0;
      fits = fits && strides_[axis] >= 0 && !__builtin_mul_overflow(numel_, steps + 1, &numel_) &&
          numel_ <= max_elements && !__builtin_mul_overflow(steps, strides_[axis], &reach) &&
          !__builtin_add_overflow(last, reach, &last);
    }
    STD_TORCH_CHECK(fits, name_, ": expected at most 2^56 elements at strides of at least 0, got the shape ", text());
    if (empty) {
      numel_ = 0;
      return;
    }
    const int64_t available = property(*tensor_, &aoti_torch_get_storage_size) / element_size(dtype_) -
        property(*tensor_, &aoti_torch_get_storage_offset);
    STD_TORCH_CHECK(
        last < available, name_, ": expected memory for ", last + 1, " elements, got a storage with ", available);
    data_ = is_written ? tensor_->mutable_data_ptr() : const_cast<void*>(tensor_->const_data_ptr());
    end_ = static_cast<const std::byte*>(data_) + (last + 1) * element_size(dtype_);
  }

  const Tensor* tensor_;
  int64_t rank_;
  const int64_t* sizes_;
  const int64_t* strides_;
  int32_t device_type_;
  Dtype dtype_ = Dtype::float32;
  int64_t numel_ = 1;
  const std::byte* end_ = nullptr;  // of its memory; null if it has no elements
};

// A result of an operator.
class Output : public Argument {
 public:
  Output(const char* name, const Tensor& tensor, Sizes sizes, const Argument& like)
      : Argument(name, tensor, sizes, like, {like.dtype()}, true) {}
  Output(const char* name, const Tensor& tensor, Sizes sizes, const Argument& like, Dtype dtype)
      : Argument(name, tensor, sizes, like, {dtype}, true) {}

  void* data() const { return data_; }

  // Checks that the map is dense, NCHW or NHWC.  Replaces the strides of axes of size 1, which are arbitrary.
  Result result() const {
    const int64_t channels = size(1), height = size(2), width = size(3);
    const Result nchw{data_, channels * height * width, height * width, width, 1};
    const Result nhwc{data_, channels * height * width, 1, width * channels, channels};
    if (numel() == 0 || (stride(3) == 1 && lies_as(nchw))) return nchw;
    if (lies_as(nhwc)) return nhwc;
    STD_TORCH_CHECK(
        lies_as(nchw), name_, ": expected a dense tensor, NCHW or NHWC, got the shape ", text(), " with the strides ",
        text_of(tensor_->strides()));
    return nchw;
  }

  // Checks that no other argument (null: absent) shares memory with this one.
  void check_apart(std::initializer_list<const Argument*> others) const {
    for (const Argument* other : others) {
      const bool apart = other == nullptr || data_ >= other->end_ || other->data_ >= end_;
      STD_TORCH_CHECK(apart, name_, ": expected memory of its own, got memory shared with ", other->name_);
    }
  }

  // `map` has the same sizes.
  bool has_strides_of(const Argument& map) const {
    return lies_as({nullptr, map.stride(0), map.stride(1), map.stride(2), map.stride(3)});
  }
  bool is(const Argument& map) const { return data_ == map.data_ && has_strides_of(map); }

 private:
  bool lies_as(const Result& other) const {
    const auto same = [this](int64_t axis, int64_t stride) { return size(axis) <= 1 || this->stride(axis) == stride; };
    return same(0, other.stride_n) && same(1, other.stride_c) && same(2, other.stride_y) && same(3, other.stride_x);
  }
};

// An optional argument; get() is null if it is absent.
template <class Kind = Argument>
class Optional {
 public:
  template <class... Dtypes>
  Optional(
      const char* name, const std::optional<Tensor>& tensor, Sizes sizes, const Argument& like, Dtypes... dtypes) {
    if (tensor.has_value()) argument_.emplace(name, *tensor, sizes, like, dtypes...);
  }

  const Kind* get() const { return argument_.has_value() ? &*argument_ : nullptr; }

 private:
  std::optional<Kind> argument_;
};

}  // namespace fpn
