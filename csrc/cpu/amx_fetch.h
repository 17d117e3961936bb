// Memory of the next block fetched while this one's products run: a block's share of a map is too short, or too
// scattered, for the hardware to see it coming.  A lateral connection of C2 took 14.1 ms with it and 16.8 without (one
// core of an Intel Xeon with AMX); maps that the last cache holds took 2 to 4 % longer.  A result in NCHW,
// where a channel's share of a block is a few lines, is fetched as well: 15.7 ms became 9.8 on two cores.  In NHWC that
// changed nothing.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

// Stretches of memory, evenly spaced.
struct Area {
  const void* first;
  int64_t stride, count, bytes;  // from one to the next, of them, of each
  bool written;                  // fetched to be written
};

class Fetcher {
 public:
  static constexpr int most = 3;

  void add(const Area& area) {
    if (area.count > 0 && area.bytes > 0) areas_[areas_count_++] = area;
  }

  // Spreads what was added over this many steps.
  void start(int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < areas_count_; ++i) lines += areas_[i].count * (areas_[i].bytes / line + 1);
    share_ = (lines + steps - 1) / steps;
  }

  void step() {
    for (int64_t i = 0; i < share_ && area_ < areas_count_; ++i) {
      const Area& area = areas_[area_];
      const char* at = static_cast<const char*>(area.first) + stretch_ * area.stride + at_;
      if (area.written) {
        __builtin_prefetch(at, 1, 2);
      } else {
        __builtin_prefetch(at, 0, 2);
      }
      at_ += line;
      if (at_ < area.bytes) continue;
      at_ = 0;
      if (++stretch_ < area.count) continue;
      stretch_ = 0;
      ++area_;
    }
  }

 private:
  static constexpr int64_t line = 64;
  Area areas_[most] = {};
  int areas_count_ = 0, area_ = 0;
  int64_t stretch_ = 0, at_ = 0, share_ = 0;
};

// What goes on beside the products: the last group's results are written, the next block's memory is fetched.
template <class Writing>
struct Beside {
  Writing& writer;
  Fetcher& fetcher;

  void step() {
    writer.step();
    fetcher.step();
  }
};

}  // namespace
