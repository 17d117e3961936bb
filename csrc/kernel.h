// Shared by all CPU kernels.
//
// An op.cpp is compiled once, for any CPU.  A kernel is compiled once per ISA (see README.md); it receives a plain
// structure, allocates nothing, checks nothing and includes no torch header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "feature_map.h"

namespace fpn::cpu {

using fpn::Dtype;
using fpn::Map;
using fpn::Result;

// Scratch memory for `count` elements, rounded up to whole cache lines.
inline constexpr int64_t line_bytes(int64_t count, int64_t element) { return (count * element + 63) / 64 * 64; }

}  // namespace fpn::cpu

// Declares a kernel in the namespace of one ISA.  A kernel computes the units begin .. end of a call.
#define FPN_DECLARE_KERNEL(isa, name, Call)                                               \
  namespace fpn::cpu::isa {                                                               \
  void name(const ::fpn::cpu::Call&, int64_t begin, int64_t end, std::byte* scratch);     \
  }

// A kernel in a *.simd.cpp file.
#define FPN_DECLARE_SIMD_KERNEL(name, Call) \
  FPN_DECLARE_KERNEL(portable, name, Call)  \
  FPN_DECLARE_KERNEL(avx2, name, Call)      \
  FPN_DECLARE_KERNEL(avx512, name, Call)

// A kernel in a *.fma.cpp file.
#define FPN_DECLARE_FMA_KERNEL(name, Call) \
  FPN_DECLARE_KERNEL(avx2, name, Call)     \
  FPN_DECLARE_KERNEL(avx512, name, Call)
