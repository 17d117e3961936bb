// Runs the threads of the kernels in csrc/cuda one after another on the host, without a GPU: every path and its index
// arithmetic.  Built by cuda_on_host.py and called through ctypes.

#include "../../csrc/cuda/upsample_add.h"
#include "../../csrc/cuda/upsample_add_backward.h"

namespace {

using namespace fpn;
using namespace fpn::cuda;

struct OneByOne {
  template <class Body>
  void operator()(const Body& body, int64_t items) const {
    for (int64_t item = 0; item < items; ++item) body(item);
  }
};

template <class Call>
int64_t run_call(const Call& call, int64_t path) {
  // The given path, or the call's own.
  const Path taken = path < 0 ? path_of(call) : static_cast<Path>(path);
  switch (call.dtype) {
    case Dtype::float16: run<Half>(call, taken, OneByOne()); break;
    case Dtype::bfloat16: run<BFloat16>(call, taken, OneByOne()); break;
    case Dtype::float32: run<float>(call, taken, OneByOne()); break;
    case Dtype::float64: run<double>(call, taken, OneByOne()); break;
  }
  return static_cast<int64_t>(taken);
}

}  // namespace

extern "C" {

int64_t merge_path(const UpsampleAdd* call) { return static_cast<int64_t>(path_of(*call)); }
int64_t merge_run(const UpsampleAdd* call, int64_t path) { return run_call(*call, path); }
int64_t adjoint_path(const UpsampleAddBackward* call) { return static_cast<int64_t>(path_of(*call)); }
int64_t adjoint_run(const UpsampleAddBackward* call, int64_t path) { return run_call(*call, path); }

// The variant with 64-bit counts, for maps of 2^31 elements or more.
void merge_run_large(const UpsampleAdd* call) {
  if (call->mode == Mode::bilinear) {
    OneByOne()(StridedMerge<float, true, Large>(*call), StridedMerge<float, true, Large>::items(*call));
  } else {
    OneByOne()(StridedMerge<float, false, Large>(*call), StridedMerge<float, false, Large>::items(*call));
  }
}
void adjoint_run_large(const UpsampleAddBackward* call) {
  if (call->mode == Mode::bilinear) {
    OneByOne()(StridedAdjoint<float, true, Large>(*call), StridedAdjoint<float, true, Large>::items(*call));
  } else {
    OneByOne()(StridedAdjoint<float, false, Large>(*call), StridedAdjoint<float, false, Large>::items(*call));
  }
}

// The first of the numbers first, first + step, ... with a wrong quotient or remainder; or -1.
int64_t wrong_division(int64_t divisor, int64_t first, int64_t step, int64_t count) {
  const FastDivide by(divisor);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = first + i * step;
    uint32_t quotient = static_cast<uint32_t>(number);
    const uint32_t remainder = by.split(quotient);
    if (quotient != number / divisor || remainder != number % divisor) return number;
  }
  return -1;
}

// Whether the adjoint's range of every coarse pixel is exactly the fine pixels that read it in the forward.
int64_t ranges_are_exact(int64_t coarse, int64_t fine, int64_t mode) {
  int32_t reader = 0;
  const auto moves_on = [&](int32_t begin, int32_t end, int32_t s, auto reads) {
    if (begin < 0 || end < begin || end > fine) return false;
    // Readers are in order: pixels before `begin` and from `end` must not read s.
    for (; reader < begin; ++reader) {
      if (reads(reader, s)) return false;
    }
    for (int32_t d = begin; d < end; ++d) {
      if (!reads(d, s)) return false;
    }
    return end == fine || !reads(end, s);
  };
  for (int32_t s = 0; s < coarse; ++s) {
    bool exact;
    if (static_cast<Mode>(mode) == Mode::bilinear) {
      const BilinearAxis<int32_t, float> axis(coarse, fine, Mode::bilinear);
      exact = moves_on(axis.begin(s), axis.end(s), s, [&](int32_t d, int32_t source) {
        const auto read = axis.source(d);
        return read.lower == source || read.upper == source;
      });
    } else {
      const NearestAxis<int32_t> axis(coarse, fine, static_cast<Mode>(mode));
      exact = moves_on(axis.begin(s), axis.end(s), s, [&](int32_t d, int32_t source) {
        return axis.source(d) == source;
      });
    }
    if (!exact) return 0;
  }
  return 1;
}

// The first wrong pair of sizes below the given ones, as coarse * 2^32 + fine; or -1.
int64_t wrong_ranges(int64_t coarse_sizes, int64_t fine_sizes, int64_t mode) {
  for (int64_t coarse = 1; coarse < coarse_sizes; ++coarse) {
    for (int64_t fine = 1; fine < fine_sizes; ++fine) {
      if (!ranges_are_exact(coarse, fine, mode)) return coarse << 32 | fine;
    }
  }
  return -1;
}

}  // extern "C"
