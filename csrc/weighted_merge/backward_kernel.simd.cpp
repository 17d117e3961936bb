#include "backward_kernel.h"

#include "../simd/map_rows.h"
#include "../simd/vectors.h"

namespace {

using fpn::cpu::WeightedMergeBackward;
using fpn::cpu::line_bytes;

// sums += left * right per lane.  Products of 16-bit numbers are exact in float32, products of float32 in float64.
template <class T>
inline void add_products(Doubles* sums, Floats left, Floats right) {
  if constexpr (std::is_same<T, float>::value) {
    sums[0] = sums[0] + low_half(left) * low_half(right);
    sums[1] = sums[1] + high_half(left) * high_half(right);
  } else {
    const Floats products = left * right;
    sums[0] = sums[0] + low_half(products);
    sums[1] = sums[1] + high_half(products);
  }
}
template <class T>
inline void add_products(Doubles* sums, Doubles left, Doubles right) {
  sums[0] = sums[0] + left * right;
}

template <bool streaming, class T, class V>
inline void scale_and_sum(T* out, const T* grad, const T* input, int64_t count, V factor, Doubles* sums) {
  // Elements beyond the end of a line are read as zero.
  over_once<V>(count, [&](int64_t i, auto extent) {
    const V from = load(grad + i, extent);
    put<streaming>(out + i, factor * from, extent);
    add_products<T>(sums, from, load(input + i, extent));
  });
}

inline double total(const Doubles* sums) {
  double lanes[Doubles::width], result = 0;
  store(lanes, sums[0] + sums[1]);
  for (const double lane : lanes) result += lane;
  return result;
}

template <class T, bool streaming>
void nchw_rows(const WeightedMergeBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  const int64_t width = call.grad.width, height = call.grad.height;
  T* grad_line = reinterpret_cast<T*>(scratch);
  T* input_line = reinterpret_cast<T*>(scratch + line_bytes(width, sizeof(T)));
  const V factor = broadcast<V>(static_cast<typename V::Scalar>(call.factor));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % height, n = unit / height / call.channels, c = unit / height % call.channels;
    const T* grad = row<T>(call.grad, n, y) + c * call.grad.stride_c;
    const T* input = row<T>(call.input, n, y) + c * call.input.stride_c;
    grad = packed(grad, call.grad.stride_x, width, grad_line);
    input = packed(input, call.input.stride_x, width, input_line);
    Doubles sums[2] = {broadcast<Doubles>(0), broadcast<Doubles>(0)};
    T* out = row<T>(call.grad_input, n, y) + c * call.grad_input.stride_c;
    scale_and_sum<streaming>(out, grad, input, width, factor, sums);
    call.sums[unit] = total(sums);
  }
}

template <class T, bool streaming>
void nhwc_rows(const WeightedMergeBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  using V = typename VectorOf<T>::type;
  const int64_t width = call.grad.width, height = call.grad.height, channels = call.channels;
  T* grad_line = reinterpret_cast<T*>(scratch);
  T* input_line = reinterpret_cast<T*>(scratch + line_bytes(width * channels, sizeof(T)));
  const V factor = broadcast<V>(static_cast<typename V::Scalar>(call.factor));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / height, y = unit % height;
    int64_t grad_stride, input_stride;
    const T* grad = packed_row(call.grad, n, y, channels, grad_stride, grad_line);
    const T* input = packed_row(call.input, n, y, channels, input_stride, input_line);
    T* out = row<T>(call.grad_input, n, y);
    Doubles sums[2] = {broadcast<Doubles>(0), broadcast<Doubles>(0)};
    if (grad_stride == channels && input_stride == channels) {
      scale_and_sum<streaming>(out, grad, input, width * channels, factor, sums);
    } else {
      for (int64_t x = 0; x < width; ++x) {
        scale_and_sum<streaming>(
            out + x * channels, grad + x * grad_stride, input + x * input_stride, channels, factor, sums);
      }
    }
    call.sums[unit] = total(sums);
  }
}

template <class T, bool streaming>
void rows(const WeightedMergeBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.channels_last ? nhwc_rows<T, streaming> : nchw_rows<T, streaming>)(call, begin, end, scratch);
  if (streaming) end_of_stream();
}

template <class T>
void rows(const WeightedMergeBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  (call.streaming ? rows<T, true> : rows<T, false>)(call, begin, end, scratch);
}

}  // namespace

namespace fpn::cpu::FPN_ISA {

void weighted_merge_backward_rows(
    const WeightedMergeBackward& call, int64_t begin, int64_t end, std::byte* scratch) {
  with_element(call.dtype, [&](auto element) { rows<decltype(element)>(call, begin, end, scratch); });
}

}  // namespace fpn::cpu::FPN_ISA
