#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

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
// Bits of leaf 7, EDX.
constexpr unsigned amx_bf16 = 1u << 22;
constexpr unsigned amx_tile = 1u << 24;

bool has(unsigned bits) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bits) == bits;
}

// The operating system must save the tiles and permit this process to use them: Linux grants them on request only.
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

Isa detect() {
#if defined(__x86_64__)
  // The compiler's run-time library also checks that the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return amx_is_usable() ? Isa::amx : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<int64_t> limit_in_use{static_cast<int64_t>(Isa::amx)};

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return static_cast<Isa>(std::min(static_cast<int64_t>(best), limit_in_use.load(std::memory_order_relaxed)));
}

int64_t limit_level(int64_t limit) {
  const int64_t best = static_cast<int64_t>(Isa::amx);
  limit_in_use.store(std::clamp(limit, int64_t{0}, best), std::memory_order_relaxed);
  return static_cast<int64_t>(isa());
}

// Measurements behind the choice:
// - float32: 228 GFLOP/s per core on Zen 5, where MKL stays at an AVX2 rate of 108.
// - float16 without AVX512_FP16: oneDNN's convolution reaches at most a seventh of this library's rate (Zen 5).  With
//   AVX512_FP16 (an Intel Xeon) the 3x3 convolution of C3 took 89 ms by oneDNN, 34 here.
// - bfloat16 pairs: measured on Zen 5 only.  AMX tiles: see amx/tile_product.h.
// - bfloat16 without AVX-512: oneDNN has no kernel, and ATen's loops take tens of times as long as float32.
Product product_of([[maybe_unused]] Dtype dtype) {
#if defined(__x86_64__)
  if (isa() < Isa::avx2 || !__builtin_cpu_supports("fma")) return Product::none;
  switch (dtype) {
    case Dtype::bfloat16: {
      if (isa() == Isa::amx) return Product::amx_tiles;
      if (isa() == Isa::avx2) return Product::fma;
      return __builtin_cpu_supports("avx512bf16") ? Product::bf16_pairs : Product::none;
    }
    case Dtype::float16:
    case Dtype::float32: return Product::fma;
    case Dtype::float64: break;
  }
#endif
  return Product::none;
}

std::string name_of(Product product) {
  switch (product) {
    case Product::amx_tiles: return "AMX tiles";
    case Product::bf16_pairs: return "AVX-512 BF16 pairs";
    case Product::fma: return isa() == Isa::avx2 ? "AVX2 FMA" : "AVX-512 FMA";
    case Product::convolution: return "convolution";
    case Product::none: break;
  }
  return "";
}

bool onednn_multiplies_bfloat16() {
  static const bool supported = [] {
    StableIValue result{};
    const char* name = "mkldnn::_is_mkldnn_bf16_supported";
    return torch_call_dispatcher(name, "", &result, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS &&
        torch::stable::detail::to<bool>(result);
  }();
  return supported;
}

namespace {
bool multiplies_by_tiles() { return product_of(Dtype::bfloat16) == Product::amx_tiles; }
}  // namespace

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  m.def("limit_level(int ceiling) -> int");
  m.def("multiplies_by_tiles() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("limit_level", TORCH_BOX(&fpn::cpu::limit_level));
  m.impl("multiplies_by_tiles", TORCH_BOX(&fpn::cpu::multiplies_by_tiles));
}
