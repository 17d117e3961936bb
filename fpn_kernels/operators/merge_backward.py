"""`fpn_kernels::merge_backward`: what a merge owes to the coarser map and to the bias, in one pass over `grad`.

``grad_top = own + gain * adjoint_of_resize(grad)`` and ``grad_bias[c] = gain * sum of grad[:, c]``.  `own` is the
gradient that the coarser map has from elsewhere, in a pyramid from its own output convolution; None is zero.  In the
nearest modes every fine pixel reads exactly one coarse pixel, so the bias is the sum of the coarse sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_adjoint


def _check(grad: Tensor, top_size: Sequence[int], own: Tensor | None, mode: str, gain: float) -> None:
    check_adjoint(grad, top_size, mode, own)


def _empty(grad: Tensor, top_size: Sequence[int], own: Tensor | None, mode: str, gain: float) -> tuple[Tensor, Tensor]:
    return allocate((*grad.shape[:2], *top_size), grad, result_format(grad)), grad.new_zeros(grad.shape[1])


def _kernel(
    grad: Tensor, top_size: Sequence[int], own: Tensor | None, *, mode: str = "nearest", gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    arguments = (grad, tuple(top_size), own, mode, gain)
    result: tuple[Tensor, Tensor] = serving.call("merge_backward", *arguments, check=_check, empty=_empty)
    return result


def _fake(
    grad: Tensor, top_size: Sequence[int], own: Tensor | None, *, mode: str = "nearest", gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    check_adjoint(grad, top_size, mode, own)
    return allocate((*grad.shape[:2], *top_size), grad, result_format(grad)), grad.new_empty(grad.shape[1])


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    grad, _, _ = inputs
    ctx.size = grad.shape
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_of_top: Tensor, grad_of_bias: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    wants_grad, _, wants_own = ctx.wants[:3]
    grad_of_grad = None
    if wants_grad:
        # Both results are linear in grad: its gradient is gain * (resize(grad_of_top) + grad_of_bias), one merge.
        lateral = grad_of_bias.view(1, -1, 1, 1).expand(ctx.size)
        grad_of_grad = direct.operators(grad_of_top, lateral).upsample_add(grad_of_top, lateral, **ctx.options)
    return grad_of_grad, None, grad_of_top if wants_own else None


_NAME = registration.define(
    "merge_backward(Tensor grad, SymInt[2] top_size, Tensor? own, *, str mode='nearest', float gain=1.0) "
    "-> (Tensor grad_top, Tensor grad_bias)",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
