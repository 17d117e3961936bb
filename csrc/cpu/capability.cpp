#include "capability.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fpn::cpu {

namespace {

Level detect() {
#if defined(__x86_64__)
  // The compiler's run-time also asks whether the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Level::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Level::avx2;
#endif
  return Level::portable;
}

#if defined(__x86_64__)
// Instructions by which oneDNN multiplies 16-bit maps at a rate that vectors do not reach: leaf 7, EDX.
constexpr unsigned amx_bf16 = 1u << 22;
constexpr unsigned avx512_fp16 = 1u << 23;

bool has(unsigned bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bit) != 0;
}
#endif

std::atomic<int64_t> ceiling_in_use{static_cast<int64_t>(Level::avx512)};

}  // namespace

Level level() {
  static const Level highest = detect();
  return static_cast<Level>(std::min(static_cast<int64_t>(highest), ceiling_in_use.load(std::memory_order_relaxed)));
}

// Measured on Zen 5, which has AVX512_BF16 and no AMX; elsewhere the choice is by the instructions alone.  In float32
// MKL stays at an AVX2 rate there, 108 GFLOP/s a core, where this library has 228.  float16 has no instructions of its
// own there, and oneDNN's convolution ran at a seventh of this library's rate and less.
bool multiplies([[maybe_unused]] Dtype dtype) {
#if defined(__x86_64__)
  if (level() != Level::avx512) return false;
  switch (dtype) {
    case Dtype::bfloat16: {
      static const bool faster = __builtin_cpu_supports("avx512bf16") && !has(amx_bf16);
      return faster;
    }
    case Dtype::float16: {
      static const bool faster = !has(avx512_fp16);
      return faster;
    }
    case Dtype::float32: return true;
    case Dtype::float64: break;
  }
#endif
  return false;
}

int64_t limit_level(int64_t ceiling) {
  const int64_t highest = static_cast<int64_t>(Level::avx512);
  ceiling_in_use.store(std::clamp(ceiling, int64_t{0}, highest), std::memory_order_relaxed);
  return static_cast<int64_t>(level());
}

}  // namespace fpn::cpu
