#pragma once

#include "../parallel.h"
#include "winograd_kernel.h"

namespace fpn::cpu {

// The fields that the convolution and the gradient of its weight share: dtype, feature, sizes and tiles.
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

}  // namespace fpn::cpu
