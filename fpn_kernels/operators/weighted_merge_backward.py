"""`fpn_kernels::weighted_merge_backward`: what one input and its factor are owed, in one pass.

``grad_input = factor * grad`` and ``grad_factor = sum of grad * input``, where `grad` already has the input's size (of
a resized input, it is the adjoint of the resize).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.eager import inner_product, scaled
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_weighted_merge_backward


def _kernel(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = serving.call(
        "weighted_merge_backward", grad, input, factor, check=check_weighted_merge_backward, empty=_empty
    )
    return result


def _empty(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return allocate(grad.shape, grad, result_format(grad)), torch.zeros_like(factor)


def _fake(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    check_weighted_merge_backward(grad, input, factor)
    return allocate(grad.shape, grad, result_format(grad)), torch.empty_like(factor)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_of_scaled: Tensor, grad_of_product: Tensor) -> tuple[Tensor | None, ...]:
    grad, input, factor = ctx.saved_tensors
    wants_grad, wants_input, wants_factor = ctx.wants
    grad_grad = grad_input = grad_factor = None
    if wants_grad:
        # Both results are linear in grad: its gradient is a weighted merge of theirs.
        factors = torch.stack((factor, grad_of_product))
        merge = direct.operators(grad_of_scaled, input, factors).weighted_merge
        grad_grad = merge(grad_of_scaled, input, None, factors)
    if wants_input and wants_factor:
        # With the gradients in each other's place it is the operator itself.
        of = direct.operators(grad, grad_of_scaled, grad_of_product).weighted_merge_backward
        grad_input, grad_factor = of(grad, grad_of_scaled, grad_of_product)
    elif wants_input:
        grad_input = scaled(grad, grad_of_product)
    elif wants_factor:
        grad_factor = inner_product(grad, grad_of_scaled)
    return grad_grad, grad_input, grad_factor


_NAME = registration.define(
    "weighted_merge_backward(Tensor grad, Tensor input, Tensor factor) -> (Tensor grad_input, Tensor grad_factor)",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
