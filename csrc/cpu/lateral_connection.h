// The ways to compute a lateral connection; each returns false where it is not the one for this CPU and these maps.
#pragma once

#include "../common/resampling.h"
#include "../operators.h"

namespace fpn::cpu {

bool lateral_connection_bfloat16(
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const std::optional<Tensor>& top,
    Mode mode,
    double gain,
    const Tensor& out);

}  // namespace fpn::cpu
