// Vectors of 16 floats or 8 doubles, on every ISA.
//
// The width is the same on every ISA and nothing is fused, so all ISAs give the same bits.  Everything is in an
// anonymous namespace: the linker could otherwise keep a function's AVX-512 copy for all ISAs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../feature_map.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
// GCC 12 warns about undefined operands in its own intrinsics (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX512BW__)
#include "vectors_avx512.h"
#elif defined(__AVX2__)
#include "vectors_avx2.h"
#else
#include "vectors_portable.h"
#endif

template <class T>
struct VectorOf {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};

// Calls step with a value of the dtype's C++ type.
template <class Step>
inline void with_element(fpn::Dtype dtype, Step&& step) {
  switch (dtype) {
    case fpn::Dtype::float16: return step(Half{});
    case fpn::Dtype::bfloat16: return step(BFloat16{});
    case fpn::Dtype::float32: return step(float{});
    case fpn::Dtype::float64: return step(double{});
  }
}

// The extent of a loop step: a whole vector, or the first `count` elements of a line shorter than a vector.
struct Whole {};
struct Part {
  int count;
};

template <class T>
inline auto load(const T* from, Whole) {
  return load(from);
}

template <class T>
inline auto load(const T* from, Part part) {
  T padded[VectorOf<T>::type::width] = {};
  for (int i = 0; i < part.count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T, class V>
inline void store(T* to, V value, Whole) {
  store(to, value);
}

template <class T, class V>
inline void store(T* to, V value, Part part) {
  T padded[V::width];
  store(padded, value);
  for (int i = 0; i < part.count; ++i) to[i] = padded[i];
}

template <class V>
inline V gather(const typename V::Scalar* from, const int32_t* index, Whole) {
  return gather(from, index);
}

template <class V>
inline V gather(const typename V::Scalar* from, const int32_t* index, Part part) {
  int32_t padded[V::width] = {};
  for (int i = 0; i < part.count; ++i) padded[i] = index[i];
  return gather(from, padded);
}

// Calls step(start, extent) over 0..count.  The last vector overlaps the one before it, so a step must not change the
// inputs of the next.
template <class V, class Step>
inline void over(int64_t count, Step&& step) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) step(i, Whole{});
  if (i == count) return;
  if (count >= V::width) {
    step(count - V::width, Whole{});
  } else {
    step(0, Part{static_cast<int>(count)});
  }
}

// The same without overlap, for sums in memory.
template <class V, class Step>
inline void over_once(int64_t count, Step&& step) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) step(i, Whole{});
  if (i < count) step(i, Part{static_cast<int>(count - i)});
}

}  // namespace
