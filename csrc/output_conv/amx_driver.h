// The 3x3 convolution and the gradient of its weight by AMX tiles, for bfloat16 maps.
#pragma once

#include "../tensors.h"

namespace fpn::cpu {

void output_conv_amx(const Argument& feature, const Argument& weight, const Argument* bias, const Output& out);

// Whether the tiles compute a gradient of these sizes.
bool backward_weight_fits_amx(const Argument& grad, const Argument& feature);
// Returns false if a value is not finite: the results are then meaningless.  bias_sums: [cout], or null.
bool output_conv_backward_weight_amx(
    const Argument& grad, const Argument& feature, const Output& grad_weight, double* bias_sums);

}  // namespace fpn::cpu
