"""`output_conv` and its backward by plain PyTorch: every device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.operators import aten
from fpn_kernels.operators.output_conv.call import OutputConv, OutputConvBackwardWeight


def output_conv(call: OutputConv) -> Tensor:
    return F.conv2d(call.feature, call.weight, call.bias, padding=1).contiguous(memory_format=call.out_format())


def output_conv_backward_weight(call: OutputConvBackwardWeight) -> tuple[Tensor, Tensor]:
    return aten.gradient_of_weight(call.grad, call.feature, call.wants_bias, call.out_format())
