"""`lateral_connection`: ``gain * (conv1x1(feature) + bias + resize(top, feature's size))``.

Without `top`, it is the convolution alone, and no gain is applied.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.operators import dispatch
from fpn_kernels.operators.lateral_connection import cpu, eager, gradient, triton
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.operator import Gradient, Operator
from fpn_kernels.operators.upsample_add.standard import laid_out, merge


def standard(call: LateralConnection) -> Tensor:
    weight = call.weight
    kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
    merged = F.conv2d(call.feature, kernel, call.bias)
    if call.top is not None:
        merged = merge(call.top, merged, call.mode, call.gain)
    return laid_out(merged, call.feature, call.memory_format)


LATERAL_CONNECTION = Operator(
    "lateral_connection(Tensor feature, Tensor weight, Tensor? bias, Tensor? top, *, "
    "str mode='nearest', float gain=1.0, MemoryFormat? memory_format=None) -> Tensor",
    LateralConnection,
    {
        "native": cpu.LATERAL_CONNECTION,
        "triton": triton.LATERAL_CONNECTION,
        "eager": dispatch.eager(
            eager.lateral_connection, "; on CUDA with one merge by the backend that serves upsample_add"
        ),
    },
    standard=standard,
    gradient=Gradient(gradient.save, gradient.backward),
    cast=4,
    exported=True,
)
