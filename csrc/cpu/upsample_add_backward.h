// The gather that the two backward operators share.
#pragma once

#include "maps.h"
#include "tables.h"

namespace fpn::cpu {

// Units of the kernel, and of its sums for the bias.
int64_t backward_units(const Argument& grad, const Output& grad_top);

// own: null, or a map with the strides of grad_top.  bias_sums: null, or room for the sums of every unit.  See kernels.h.
void gather_gradient(
    const Argument& grad, const Argument* own, Mode mode, double gain, const Output& grad_top, double* bias_sums);

}  // namespace fpn::cpu
