// Division of 31-bit numbers by a divisor known before the launch, as a multiplication and a shift.
#pragma once

#include <cstdint>

#include "../resampling.h"

namespace fpn::cuda {

// T. Granlund and P. Montgomery, "Division by Invariant Integers using Multiplication" (PLDI 1994), theorem 4.2:
// with 2^(l-1) < d <= 2^l and m = ceil(2^(31+l) / d), floor(n / d) == (n m) >> (31 + l) for 0 <= n < 2^31, and m
// fits into 32 bits.
class FastDivide {
 public:
  FastDivide() = default;
  explicit FastDivide(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t power = uint64_t{1} << (31 + shift_);
    multiplier_ = static_cast<uint32_t>((power + divisor_ - 1) / divisor_);
  }

  // Replaces n by the quotient and returns the remainder.
  FPN_HOST_DEVICE uint32_t split(uint32_t& n) const {
    const uint64_t product = static_cast<uint64_t>(n) * multiplier_;
    const uint32_t quotient = static_cast<uint32_t>(product >> 31) >> shift_;
    const uint32_t remainder = n - quotient * divisor_;
    n = quotient;
    return remainder;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 0x80000000u, shift_ = 0;
};

// The same interface for numbers of more than 31 bits.
class PlainDivide {
 public:
  PlainDivide() = default;
  explicit PlainDivide(int64_t divisor) : divisor_(divisor) {}

  FPN_HOST_DEVICE int64_t split(int64_t& n) const {
    const int64_t quotient = n / divisor_, remainder = n - quotient * divisor_;
    n = quotient;
    return remainder;
  }

 private:
  int64_t divisor_ = 1;
};

// 32-bit item numbers, which suffice for nearly every call, or 64-bit ones.
struct Small {
  using Index = uint32_t;
  using Divide = FastDivide;
};
struct Large {
  using Index = int64_t;
  using Divide = PlainDivide;
};

}  // namespace fpn::cuda
