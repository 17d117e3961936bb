"""`fpn_kernels::output_conv_backward_weight`: what the 3x3 convolution owes to its weight and its bias.

``grad_weight[o, i, ky, kx] = sum of grad[:, o, y, x] * feature[:, i, y + ky - 1, x + kx - 1]`` over the pixels of the
maps, and ``grad_bias[o] = sum of grad[:, o]`` on the way: a sum of its own would read all of `grad` again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_memory_format, check_output_conv_backward_weight


def _format(memory_format: torch.memory_format | None) -> torch.memory_format:
    return torch.channels_last if memory_format == torch.channels_last else torch.contiguous_format


def _check(grad: Tensor, feature: Tensor, wants_bias: bool, memory_format: torch.memory_format | None) -> None:
    check_output_conv_backward_weight(grad, feature, memory_format)


def _empty(
    grad: Tensor, feature: Tensor, wants_bias: bool, memory_format: torch.memory_format | None
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_bias = _fake(grad, feature, wants_bias=wants_bias, memory_format=memory_format)
    return grad_weight.zero_(), grad_bias.zero_()


def _kernel(
    grad: Tensor, feature: Tensor, *, wants_bias: bool = True, memory_format: torch.memory_format | None = None
) -> tuple[Tensor, Tensor]:
    check_memory_format(memory_format)
    result: tuple[Tensor, Tensor] = serving.call(
        "output_conv_backward_weight",
        *(grad, feature, wants_bias, _format(memory_format)),
        check=_check,
        empty=_empty,
    )
    return result


def _fake(
    grad: Tensor, feature: Tensor, *, wants_bias: bool = True, memory_format: torch.memory_format | None = None
) -> tuple[Tensor, Tensor]:
    check_output_conv_backward_weight(grad, feature, memory_format)
    grad_weight = allocate((grad.shape[1], feature.shape[1], 3, 3), grad, _format(memory_format))
    return grad_weight, grad.new_empty(grad.shape[1] if wants_bias else 0)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    grad, feature = inputs
    wants_grad, wants_feature = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if wants_feature else None, feature if wants_grad else None)
    ctx.wants_bias = keyword_only_inputs["wants_bias"]
    ctx.formats = result_format(grad), result_format(feature)


def _backward(ctx: Any, grad_of_weight: Tensor, grad_of_bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    grad, feature = ctx.saved_tensors
    grad_grad = grad_feature = None
    if feature is not None:
        # The results are linear in grad: its gradient is the convolution itself, of theirs.
        bias = grad_of_bias if ctx.wants_bias else None
        convolve = direct.operators(feature, grad_of_weight, bias).output_conv
        grad_grad = convolve(feature, grad_of_weight, bias, memory_format=ctx.formats[0])
    if grad is not None:
        # And in the feature, with the convolution's adjoint (output_conv.py).
        adjoint = grad_of_weight.flip(2, 3).transpose(0, 1)
        convolve = direct.operators(grad, adjoint).output_conv
        grad_feature = convolve(grad, adjoint, None, memory_format=ctx.formats[1])
    return grad_grad, grad_feature


_NAME = registration.define(
    # Without wants_bias, grad_bias has no elements.
    "output_conv_backward_weight(Tensor grad, Tensor feature, *, bool wants_bias=True, "
    "MemoryFormat? memory_format=None) -> (Tensor grad_weight, Tensor grad_bias)",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
