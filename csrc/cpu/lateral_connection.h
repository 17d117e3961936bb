// The ways to compute a lateral connection; each returns false where it is not the one for this CPU and these maps.
#pragma once

#include "../common/resampling.h"
#include "../common/tensors.h"

namespace fpn::cpu {

bool lateral_connection_bfloat16(
    const Argument& feature,
    const Argument& weight,
    const Argument& bias,
    const Argument* top,
    Mode mode,
    double gain,
    const Output& out);

}  // namespace fpn::cpu
