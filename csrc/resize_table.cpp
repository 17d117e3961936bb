#include "resize_table.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace fpn::cpu {

namespace {

template <class Real>
void fill_bilinear(
    int64_t in_size,
    int64_t out_size,
    std::vector<int32_t>& lower,
    std::vector<int32_t>& upper,
    std::vector<Real>& weight) {
  const Real scale = resize_scale<Real>(in_size, out_size);
  upper.resize(out_size);
  weight.resize(out_size);
  for (int64_t i = 0; i < out_size; ++i) {
    const BilinearSource<Real> source = bilinear_source<Real>(i, scale, in_size);
    lower[i] = static_cast<int32_t>(source.lower);
    upper[i] = static_cast<int32_t>(source.upper);
    weight[i] = source.weight;
  }
}

template <class T>
const T* or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

}  // namespace

ResizeTable::ResizeTable(int64_t in_size, int64_t out_size, Mode mode, Dtype dtype) : lower_(out_size) {
  STD_TORCH_CHECK(in_size <= INT32_MAX, "expected at most 2^31 - 1 pixels along an axis, got ", in_size);
  if (mode == Mode::bilinear) {
    if (dtype == Dtype::float64) {
      fill_bilinear(in_size, out_size, lower_, upper_, weight64_);
    } else {
      fill_bilinear(in_size, out_size, lower_, upper_, weight_);
    }
    return;
  }
  const float scale = resize_scale<float>(in_size, out_size);
  const float shift = mode == Mode::nearest_exact ? 0.5f : 0.0f;
  doubled_ = out_size == 2 * in_size;
  for (int64_t i = 0; i < out_size; ++i) {
    lower_[i] = static_cast<int32_t>(nearest_source(i, scale, shift, in_size));
    doubled_ = doubled_ && lower_[i] == i / 2;
  }
}

ForwardAxis ResizeTable::axis() const {
  return {lower_.data(), or_null(upper_), or_null(weight_), or_null(weight64_), doubled_};
}

AdjointTable::AdjointTable(int64_t in_size, int64_t out_size, Mode mode, Dtype dtype)
    : begin_(in_size), count_(in_size), own_begin_(in_size), own_count_(in_size) {
  STD_TORCH_CHECK(out_size <= INT32_MAX, "expected at most 2^31 - 1 pixels along an axis, got ", out_size);
  const ResizeTable forward(in_size, out_size, mode, dtype);
  const std::vector<int32_t>& lower = forward.lower_;
  const std::vector<int32_t>& upper = forward.upper_.empty() ? forward.lower_ : forward.upper_;
  // Both tables are non-decreasing and upper is lower or lower + 1, so the readers of s form one range.
  for (int64_t s = 0; s < in_size; ++s) {
    const auto own = std::equal_range(lower.begin(), lower.end(), static_cast<int32_t>(s));
    const auto first = std::lower_bound(upper.begin(), upper.end(), static_cast<int32_t>(s));
    const int64_t stop = own.second - lower.begin();
    own_begin_[s] = static_cast<int32_t>(own.first - lower.begin());
    own_count_[s] = static_cast<int32_t>(own.second - own.first);
    begin_[s] = static_cast<int32_t>(first - upper.begin());
    count_[s] = static_cast<int32_t>(stop - begin_[s]);
    longest_ = std::max<int64_t>(longest_, count_[s]);
  }
  doubled_ = forward.doubled_;
  index_.assign(longest_ * in_size, 0);
  weight_.assign(dtype == Dtype::float64 ? 0 : longest_ * in_size, 0);
  // float32 maps are summed in float64 with the same weights.
  const bool wide = dtype == Dtype::float64 || (dtype == Dtype::float32 && mode == Mode::bilinear);
  weight64_.assign(wide ? longest_ * in_size : 0, 0);
  for (int64_t s = 0; s < in_size; ++s) {
    for (int64_t k = 0; k < count_[s]; ++k) {
      const int64_t pixel = begin_[s] + k, entry = k * in_size + s;
      const bool reads_lower = lower[pixel] == s, reads_upper = upper[pixel] == s;
      index_[entry] = static_cast<int32_t>(pixel);
      if (dtype == Dtype::float64) {
        const double high = mode == Mode::bilinear ? forward.weight64_[pixel] : 0;
        weight64_[entry] = (reads_lower ? 1 - high : 0) + (reads_upper ? high : 0);
      } else {
        const float high = mode == Mode::bilinear ? forward.weight_[pixel] : 0;
        weight_[entry] = (reads_lower ? 1 - high : 0) + (reads_upper ? high : 0);
        if (wide) weight64_[entry] = static_cast<double>(weight_[entry]);
      }
    }
  }
}

AdjointAxis AdjointTable::axis() const {
  return {
      begin_.data(),     count_.data(),      longest_,         index_.data(), or_null(weight_), or_null(weight64_),
      own_begin_.data(), own_count_.data(), doubled_};
}

}  // namespace fpn::cpu
