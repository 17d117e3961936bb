// The ways to compute the 3x3 convolution; each returns false where it is not the one for this CPU and dtype.
#pragma once

#include "../operators.h"
#include "maps.h"

namespace fpn::cpu {

// The convolution of a feature as its gradient needs it, too: dtype, feature, sizes and tiles.
inline OutputConv convolution_of(const Tensor& feature, int64_t cout) {
  OutputConv call{};
  call.dtype = dtype_of(feature);
  call.feature = map_of(feature);
  call.batch = feature.size(0);
  call.cin = feature.size(1);
  call.cout = cout;
  call.tiles_down = divide_up(call.feature.height, 2);
  call.tiles_across = divide_up(call.feature.width, 2);
  call.tiles = call.batch * call.tiles_down * call.tiles_across;
  return call;
}

bool output_conv_bfloat16(
    const Tensor& feature, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out);

}  // namespace fpn::cpu
