#pragma once

#include "../resampling.h"
#include "../tensors.h"

namespace fpn::cpu {

// The lateral connection of bfloat16 maps by AMX tiles.  The top, if any, is NHWC.
void lateral_connection_amx(
    const Argument& feature,
    const Argument& weight,
    const Argument& bias,
    const Argument* top,
    Mode mode,
    double gain,
    const Output& out);

}  // namespace fpn::cpu
