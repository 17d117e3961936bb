// The ways to compute the gradient of the 3x3 convolution's weight; each returns false where it is not the one.
#pragma once

#include "../common/tensors.h"

namespace fpn::cpu {

// bias_sums: room for the sums of grad, or null.
bool output_conv_backward_weight_bfloat16(
    const Argument& grad, const Argument& feature, const Output& grad_weight, double* bias_sums);

}  // namespace fpn::cpu
