"""`fpn_kernels::channel_sums`: the sum of each channel's pixels, which is what a convolution owes to its bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.operators import registration
from fpn_kernels.operators.checks import check_map


def _kernel(source: Tensor) -> Tensor:
    result: Tensor = serving.call("channel_sums", source, check=_check, empty=_nothing)
    return result


def _check(source: Tensor) -> None:
    check_map("source", source)


def _nothing(source: Tensor) -> Tensor:
    return source.new_zeros(source.shape[1])


def _fake(source: Tensor) -> Tensor:
    _check(source)
    return source.new_empty(source.shape[1])


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.view(1, -1, 1, 1).expand(ctx.shape)


_NAME = registration.define("channel_sums(Tensor source) -> Tensor", _kernel, _fake)
registration.differentiable(_NAME, _backward, _setup_context)
