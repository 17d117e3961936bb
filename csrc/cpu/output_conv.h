// The ways to compute the 3x3 convolution; each returns false where it is not the one for this CPU and dtype.
#pragma once

#include "maps.h"

namespace fpn::cpu {

// The convolution of a feature as its gradient needs it, too: dtype, feature, sizes and tiles.
inline OutputConv convolution_of(const Argument& feature, int64_t cout) {
  OutputConv call{};
  call.dtype = feature.dtype();
  call.feature = feature.map();
  call.batch = feature.size(0);
  call.cin = feature.size(1);
  call.cout = cout;
  call.tiles_down = divide_up(call.feature.height, 2);
  call.tiles_across = divide_up(call.feature.width, 2);
  call.tiles = call.batch * call.tiles_down * call.tiles_across;
  return call;
}

bool output_conv_bfloat16(
    const Argument& feature, const Argument& weight, const Argument* bias, const Output& out);

}  // namespace fpn::cpu
