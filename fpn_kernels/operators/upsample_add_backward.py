"""`fpn_kernels::upsample_add_backward`: the gradient of the coarser map, ``gain * adjoint_of_resize(grad)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_adjoint


def _check(grad: Tensor, top_size: Sequence[int], mode: str, gain: float) -> None:
    check_adjoint(grad, top_size, mode)


def _allocate(grad: Tensor, top_size: Sequence[int], mode: str, gain: float) -> Tensor:
    return allocate((*grad.shape[:2], *top_size), grad, result_format(grad))


def _kernel(grad: Tensor, top_size: Sequence[int], *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    options = (tuple(top_size), mode, gain)
    result: Tensor = serving.call("upsample_add_backward", grad, *options, check=_check, empty=_allocate)
    return result


def _fake(grad: Tensor, top_size: Sequence[int], *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    _check(grad, top_size, mode, gain)
    return _allocate(grad, top_size, mode, gain)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    grad, _ = inputs
    ctx.size = grad.shape
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_of_result: Tensor) -> tuple[Tensor, None]:
    # The adjoint of the adjoint is the resize itself: a merge onto a lateral of zeros that has no storage to read.
    zeros = grad_of_result.new_zeros(()).expand(ctx.size)
    return direct.operators(grad_of_result).upsample_add(grad_of_result, zeros, **ctx.options), None


_NAME = registration.define(
    "upsample_add_backward(Tensor grad, SymInt[2] top_size, *, str mode='nearest', float gain=1.0) -> Tensor",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
