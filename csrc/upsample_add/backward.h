// The gather that upsample_add_backward and merge_backward share.
#pragma once

#include "../resampling.h"
#include "../tensors.h"

namespace fpn::cpu {

// Units of the kernel; bias_sums has one line of sums per unit (backward_kernel.h).
int64_t backward_units(const Argument& grad, const Output& grad_top);

// upstream: the upstream gradient of top, with the strides of grad_top; or null.  bias_sums: a buffer for the sums of
// all units; or null.
void gather_gradient(
    const Argument& grad, const Argument* upstream, Mode mode, double gain, const Output& grad_top, double* bias_sums);

}  // namespace fpn::cpu
