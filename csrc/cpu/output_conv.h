// The ways to compute the 3x3 convolution; each returns false where it is not the one for this CPU and dtype.
#pragma once

#include "../operators.h"

namespace fpn::cpu {

bool output_conv_bfloat16(
    const Tensor& feature, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out);

}  // namespace fpn::cpu
