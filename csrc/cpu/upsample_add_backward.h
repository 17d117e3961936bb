// The gather that the two backward operators share.
#pragma once

#include "maps.h"
#include "tables.h"

namespace fpn::cpu {

// Units of the kernel, and of its sums for the bias.
int64_t backward_units(const Tensor& grad, const Tensor& grad_top, bool& channels_last);

// own: null, or a map with the strides of grad_top.  bias_sums: null, or room for the sums of every unit.  See kernels.h.
void gather_gradient(
    const Tensor& grad, const void* own, Mode mode, double gain, const Tensor& grad_top, double* bias_sums);

}  // namespace fpn::cpu
