// Which kernels this CPU runs: the ISA, and the product of matrices.
#pragma once

#include <cstdint>
#include <string>

#include "kernel.h"

namespace fpn::cpu {

// `amx` is avx512 with AMX tiles; only matrix products distinguish the two.
enum class Isa : int64_t { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best ISA of this CPU, or the limit set by limit_level if that is lower.
Isa isa();

// For tests, which compare the ISAs bit for bit: limits isa().  Returns the ISA in use.
int64_t limit_level(int64_t limit);

// How a call's matrices are multiplied.
enum class Product {
  none,         // not by this library; the caller's fallback is PyTorch's product
  convolution,  // by PyTorch's convolution (oneDNN), which was measured faster
  fma,          // float32 vectors with fused multiply-add
  bf16_pairs,   // AVX512_BF16
  amx_tiles,
};

// The fastest product of a dtype in this library on this CPU; none if PyTorch's are faster.
Product product_of(Dtype dtype);

// "AMX tiles", "AVX-512 BF16 pairs", "AVX-512 FMA", "AVX2 FMA", "convolution"; "" for none.
std::string name_of(Product product);

// Whether oneDNN multiplies bfloat16 on this CPU.
bool onednn_multiplies_bfloat16();

template <class Kernel>
Kernel for_isa(Kernel portable, [[maybe_unused]] Kernel avx2, [[maybe_unused]] Kernel avx512) {
  switch (isa()) {
    case Isa::amx:
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::portable: break;
  }
  return portable;
}

// The variant of a *.simd.cpp or *.fma.cpp kernel for this CPU.  An FMA kernel requires product_of != none.
#if defined(__x86_64__)
#define FPN_SIMD_KERNEL(kernel) \
  ::fpn::cpu::for_isa(&::fpn::cpu::portable::kernel, &::fpn::cpu::avx2::kernel, &::fpn::cpu::avx512::kernel)
#define FPN_FMA_KERNEL(kernel) \
  (::fpn::cpu::isa() == ::fpn::cpu::Isa::avx2 ? &::fpn::cpu::avx2::kernel : &::fpn::cpu::avx512::kernel)
#else
#define FPN_SIMD_KERNEL(kernel) (&::fpn::cpu::portable::kernel)
#endif

}  // namespace fpn::cpu
