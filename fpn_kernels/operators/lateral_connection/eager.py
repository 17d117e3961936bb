"""`lateral_connection` by plain PyTorch: every device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.layouts import allocate
from fpn_kernels.operators.upsample_add import UPSAMPLE_ADD, eager
from fpn_kernels.operators.upsample_add.call import UpsampleAdd


def lateral_connection(call: LateralConnection) -> Tensor:
    out_format, top = call.out_format(), call.top
    lateral = F.conv2d(call.feature, call.matrix()[:, :, None, None], call.bias)
    if top is None:
        return lateral.contiguous(memory_format=out_format)
    in_place = lateral.is_contiguous(memory_format=out_format)
    if in_place and lateral.device.type != "cpu":
        # One pass, and not two, where a backend has the merge; on the CPU such a backend has the connection as well.
        merge_call = UpsampleAdd(top, lateral, call.mode, call.gain)
        merge = UPSAMPLE_ADD.plan(merge_call)
        if merge.backend != "eager":
            merged: Tensor = merge(merge_call)
            return merged
    out = lateral if in_place else allocate(lateral.shape, lateral, out_format)
    return eager.merge(top, lateral, call.mode, call.gain, out)
