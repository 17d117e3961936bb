// Which of the kernels compiled for several instruction sets this CPU runs.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fpn::cpu {

// `amx` is avx512 and its tiles: only matrix products tell them apart.
enum class Level : int64_t { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The highest level that this CPU has, or the ceiling where that is lower.
Level level();

// For tests: all levels give the same bits.  Returns the level then in use.
int64_t limit_level(int64_t ceiling);

// By what this library multiplies matrices of a dtype on this CPU: float32 vectors, vectors of bfloat16 pairs, AMX tiles,
// or nothing where PyTorch's own products are faster.
enum class Product { none, floats, pairs, tiles };
Product product_of(Dtype dtype);

// Whether bfloat16 is multiplied by AMX tiles.
bool multiplies_by_tiles();

template <class Kernel>
Kernel choose(Kernel portable, [[maybe_unused]] Kernel avx2, [[maybe_unused]] Kernel avx512) {
  switch (level()) {
    case Level::amx:
    case Level::avx512: return avx512;
    case Level::avx2: return avx2;
    case Level::portable: break;
  }
  return portable;
}

#if defined(__x86_64__)
#define FPN_CHOOSE(kernel) \
  ::fpn::cpu::choose(&::fpn::cpu::portable::kernel, &::fpn::cpu::avx2::kernel, &::fpn::cpu::avx512::kernel)
// Of the products, where there are any: see product_of.
#define FPN_CHOOSE_PRODUCT(kernel) \
  (::fpn::cpu::level() == ::fpn::cpu::Level::avx2 ? &::fpn::cpu::avx2::kernel : &::fpn::cpu::avx512::kernel)
#else
#define FPN_CHOOSE(kernel) (&::fpn::cpu::portable::kernel)
#endif

}  // namespace fpn::cpu
