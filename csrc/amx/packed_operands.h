// Buffers for the packed weight and the bias, for the drivers of the AMX kernels.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../parallel.h"
#include "sizes.h"

namespace fpn::cpu {

// The packed weight, and the bias in float32, both padded to whole panels.
class AmxOperands {
 public:
  AmxOperands(const Argument& weight, const int64_t (&strides)[4], int64_t taps, const Argument* bias)
      : weight_{
            weight.data(),
            strides[0],
            strides[1],
            strides[2],
            strides[3],
            weight.size(0),
            weight.size(1),
            taps,
            divide_up(weight.size(1), amx_tile_channels),
            divide_up(weight.size(0), amx_panel_channels),
            nullptr},
        room_(weight_.panels * weight_.chunks * taps * amx_panel_bytes),
        bias_(static_cast<size_t>(weight_.panels * amx_panel_channels)) {
    weight_.packed = room_.data();
    for (int64_t i = 0; bias != nullptr && i < weight_.cout; ++i) bias_[static_cast<size_t>(i)] = element(*bias, i);
  }

  void pack() const {
#if defined(FPN_AMX)
    run_units(&amx::pack_weight, weight_, weight_.panels * weight_.chunks, weight_.taps * amx_panel_bytes / 2, 0);
#endif
  }
  const AmxWeight& weight() const { return weight_; }
  const float* bias() const { return bias_.data(); }

 private:
  // An element of a bfloat16 or float32 bias.
  static float element(const Argument& bias, int64_t index) {
    const int64_t at = index * bias.stride(0);
    if (bias.dtype() == Dtype::float32) return static_cast<const float*>(bias.data())[at];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(bias.data())[at]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  AmxWeight weight_;
  Scratch room_;
  std::vector<float> bias_;
};

}  // namespace fpn::cpu
