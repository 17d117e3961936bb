#include "capability.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fpn::cpu {

namespace {

#if defined(__x86_64__)
// Of leaf 7, EDX.
constexpr unsigned amx_bf16 = 1u << 22;
constexpr unsigned amx_tile = 1u << 24;

bool has(unsigned bits) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bits) == bits;
}

// Whether the operating system saves the tiles, and lets this process have them: Linux hands them out on request only.
bool amx_is_usable() {
#if defined(FPN_AMX)
  if (!has(amx_bf16 | amx_tile) || !__builtin_cpu_supports("avx512bf16")) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3u << 17;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (low & tile_state) == tile_state && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

Level detect() {
#if defined(__x86_64__)
  // The compiler's run-time also asks whether the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return amx_is_usable() ? Level::amx : Level::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Level::avx2;
#endif
  return Level::portable;
}

std::atomic<int64_t> ceiling_in_use{static_cast<int64_t>(Level::amx)};

}  // namespace

Level level() {
  static const Level highest = detect();
  return static_cast<Level>(std::min(static_cast<int64_t>(highest), ceiling_in_use.load(std::memory_order_relaxed)));
}

// Measured on Zen 5, which has AVX512_BF16 and no AMX; elsewhere the choice is by the instructions alone.  In float32
// MKL stays at an AVX2 rate there, 108 GFLOP/s a core, where this library has 228.  float16 has no instructions of its
// own there, and oneDNN's convolution ran at a seventh of this library's rate and less; on an Intel Xeon that has them
// (AVX512_FP16) the 3x3 convolution of C3 took 89 ms against 34, the lateral connection no less.  By tiles: see amx.h.
// Below AVX-512 oneDNN has neither of the 16-bit dtypes, and ATen's own loops took tens of times as long as float32's.
Product product_of([[maybe_unused]] Dtype dtype) {
#if defined(__x86_64__)
  if (level() < Level::avx2 || !__builtin_cpu_supports("fma")) return Product::none;
  switch (dtype) {
    case Dtype::bfloat16: {
      if (level() == Level::amx) return Product::tiles;
      if (level() == Level::avx2) return Product::floats;
      return __builtin_cpu_supports("avx512bf16") ? Product::pairs : Product::none;
    }
    case Dtype::float16:
    case Dtype::float32: return Product::floats;
    case Dtype::float64: break;
  }
#endif
  return Product::none;
}

bool multiplies_by_tiles() { return product_of(Dtype::bfloat16) == Product::tiles; }

int64_t limit_level(int64_t ceiling) {
  const int64_t highest = static_cast<int64_t>(Level::amx);
  ceiling_in_use.store(std::clamp(ceiling, int64_t{0}, highest), std::memory_order_relaxed);
  return static_cast<int64_t>(level());
}

}  // namespace fpn::cpu
