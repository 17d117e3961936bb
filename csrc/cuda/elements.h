// Loads and stores of elements, up to 16 bytes at a time, and the dtype of their accumulators.
//
// Compiles for the host as well, so that tests/cuda/ runs the kernels without a GPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../resampling.h"

namespace fpn::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

constexpr int64_t access_bytes = 16;

// The dtype of an accumulator.
template <class T>
struct Sums {
  using type = float;
};
template <>
struct Sums<double> {
  using type = double;
};
template <class T>
using SumOf = typename Sums<T>::type;

template <class T>
FPN_HOST_DEVICE SumOf<T> widened(T value) {
  return static_cast<SumOf<T>>(value);
}

// One element of a map that no thread writes.
template <class T>
FPN_HOST_DEVICE SumOf<T> element_at(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(from));
    return widened(*reinterpret_cast<const T*>(&bits));
  } else {
    return __ldg(from);
  }
#else
  return widened(*from);
#endif
}

// The elements of one access of `bytes` bytes.
template <class T, int bytes = access_bytes>
struct alignas(bytes) Vector {
  static constexpr int width = bytes / static_cast<int>(sizeof(T));
  static_assert(width >= 1, "an element is larger than the access");
  T values[width];
};

#if defined(__CUDA_ARCH__)
template <int bytes>
struct Access;
template <>
struct Access<16> {
  using type = uint4;
};
template <>
struct Access<8> {
  using type = uint2;
};
#endif

template <int bytes = access_bytes, class T>
FPN_HOST_DEVICE Vector<T, bytes> load(const T* from) {
  Vector<T, bytes> vector;
#if defined(__CUDA_ARCH__)
  using Bits = typename Access<bytes>::type;
  *reinterpret_cast<Bits*>(&vector) = __ldg(reinterpret_cast<const Bits*>(from));
#else
  memcpy(&vector, from, bytes);
#endif
  return vector;
}

template <class T, int bytes>
FPN_HOST_DEVICE void store(T* to, const Vector<T, bytes>& vector) {
#if defined(__CUDA_ARCH__)
  static_assert(bytes == access_bytes, "whole accesses only");
  const uint4 bits = *reinterpret_cast<const uint4*>(&vector);
  // Inline PTX: nvcc 13.0 compiles an assignment to four narrow stores, and __stwb to a store with memory ordering.
  asm("st.global.v4.b32 [%0], {%1, %2, %3, %4};" : : "l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w));
#else
  memcpy(to, &vector, bytes);
#endif
}

// Rounds a vector; on the device 16-bit floats in pairs, one instruction per pair.
template <class T, int bytes>
FPN_HOST_DEVICE void round_to(Vector<T, bytes>& vector, const SumOf<T>* sums) {
  for (int i = 0; i < vector.width; ++i) vector.values[i] = static_cast<T>(sums[i]);
}
#if defined(__CUDA_ARCH__)
template <int bytes>
__device__ __forceinline__ void round_to(Vector<BFloat16, bytes>& vector, const float* sums) {
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&vector);
#pragma unroll
  for (int i = 0; i < vector.width / 2; ++i) pairs[i] = __floats2bfloat162_rn(sums[2 * i], sums[2 * i + 1]);
}
template <int bytes>
__device__ __forceinline__ void round_to(Vector<Half, bytes>& vector, const float* sums) {
  auto* pairs = reinterpret_cast<__half2*>(&vector);
#pragma unroll
  for (int i = 0; i < vector.width / 2; ++i) pairs[i] = __floats2half2_rn(sums[2 * i], sums[2 * i + 1]);
}
#endif

}  // namespace fpn::cuda
