"""`fpn_kernels::output_conv`: the 3x3 convolution (stride 1, padding 1) of a merged map, and its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import selection
from fpn_kernels.backends.eager import sum_per_channel
from fpn_kernels.backends.layouts import allocate, requested_format, result_format
from fpn_kernels.operators import registration
from fpn_kernels.operators.checks import check_output_conv


def _kernel(
    feature: Tensor, weight: Tensor, bias: Tensor | None, *, memory_format: torch.memory_format | None = None
) -> Tensor:
    check_output_conv(feature, weight, bias, memory_format)
    if feature.numel() == 0:
        return _fake(feature, weight, bias, memory_format=memory_format)
    result: Tensor = selection.call("output_conv", feature, weight, bias, memory_format)
    return result


def _fake(
    feature: Tensor, weight: Tensor, bias: Tensor | None, *, memory_format: torch.memory_format | None = None
) -> Tensor:
    check_output_conv(feature, weight, bias, memory_format)
    shape = (feature.shape[0], weight.shape[0], *feature.shape[2:])
    return allocate(shape, feature, requested_format(feature, memory_format))


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    feature, weight, _ = inputs
    wants_feature, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(feature if wants_weight else None, weight if wants_feature else None)
    ctx.feature_format = result_format(feature)


def _weight_gradient(grad: Tensor, feature: Tensor) -> Tensor:
    # The values of the weight do not enter its own gradient; only its shape is read.
    weight = feature.new_zeros(()).expand(grad.shape[1], feature.shape[1], 3, 3)
    result: Tensor = torch.ops.aten.convolution_backward(
        grad, feature, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    return result


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wants_feature, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    feature, weight = ctx.saved_tensors
    grad_feature = grad_weight = grad_bias = None
    if wants_bias:
        grad_bias = sum_per_channel(grad, 1.0)
    if wants_feature:
        # The adjoint of a 3x3 convolution with padding 1 is the one with the weight turned about and transposed.
        adjoint = weight.flip(2, 3).transpose(0, 1)
        grad_feature = torch.ops.fpn_kernels.output_conv(grad, adjoint, None, memory_format=ctx.feature_format)
    if wants_weight:
        grad_weight = _weight_gradient(grad, feature)
    return grad_feature, grad_weight, grad_bias


_NAME = registration.define(
    # No default before the star: see lateral_connection.py.
    "output_conv(Tensor feature, Tensor weight, Tensor? bias, *, MemoryFormat? memory_format=None) -> Tensor",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
registration.autocast(_NAME)
