// Builds the tables of resize_axis.h, once per call.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "resampling.h"
#include "resize_axis.h"

namespace fpn::cpu {

class ResizeTable {
 public:
  ResizeTable(int64_t in_size, int64_t out_size, Mode mode, Dtype dtype);
  ForwardAxis axis() const;

 private:
  friend class AdjointTable;
  std::vector<int32_t> lower_, upper_;
  std::vector<float> weight_;
  std::vector<double> weight64_;
  bool doubled_ = false;
};

// Inverts the forward's indices, so that it is exact at every pair of sizes.
class AdjointTable {
 public:
  AdjointTable(int64_t in_size, int64_t out_size, Mode mode, Dtype dtype);
  AdjointAxis axis() const;

 private:
  std::vector<int32_t> begin_, count_, index_, own_begin_, own_count_;
  std::vector<float> weight_;
  std::vector<double> weight64_;
  int64_t longest_ = 0;
  bool doubled_ = false;
};

}  // namespace fpn::cpu
