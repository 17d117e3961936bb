"""`channel_sums`: the sum of each channel over all pixels, which is the gradient of a convolution's bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fpn_kernels.operators import dispatch
from fpn_kernels.operators.channel_sums import triton
from fpn_kernels.operators.channel_sums.call import ChannelSums
from fpn_kernels.operators.operator import Gradient, Operator
from fpn_kernels.operators.sums import sum_per_channel


def _eager(call: ChannelSums) -> Tensor:
    return sum_per_channel(call.source, 1.0)


def _save(ctx: Any, call: ChannelSums, result: Tensor) -> None:
    ctx.shape = call.source.shape


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.view(1, -1, 1, 1).expand(ctx.shape)


CHANNEL_SUMS = Operator(
    "channel_sums(Tensor source) -> Tensor",
    ChannelSums,
    {"triton": triton.CHANNEL_SUMS, "eager": dispatch.eager(_eager)},
    standard=_eager,
    gradient=Gradient(_save, _backward),
)
