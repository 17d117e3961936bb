"""`fpn_kernels::upsample_add`: ``gain * (lateral + resize(top, lateral's size))``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_upsample_add


def _check(top: Tensor, lateral: Tensor, mode: str, gain: float) -> None:
    check_upsample_add(top, lateral, mode)


def _allocate(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Tensor:
    return allocate(lateral.shape, lateral, result_format(lateral))


def _kernel(top: Tensor, lateral: Tensor, *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    result: Tensor = serving.call("upsample_add", top, lateral, mode, gain, check=_check, empty=_allocate)
    return result


def _fake(top: Tensor, lateral: Tensor, *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    _check(top, lateral, mode, gain)
    return _allocate(top, lateral, mode, gain)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    top, _ = inputs
    ctx.top_size = top.shape[2:]
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wants_top, wants_lateral = ctx.wants[:2]
    gain = ctx.options["gain"]
    grad_top = grad_lateral = None
    if wants_top:
        grad_top = direct.operators(grad).upsample_add_backward(grad, ctx.top_size, **ctx.options)
    if wants_lateral:
        grad_lateral = grad if gain == 1.0 else grad * gain
    return grad_top, grad_lateral


_NAME = registration.define(
    "upsample_add(Tensor top, Tensor lateral, *, str mode='nearest', float gain=1.0) -> Tensor", _kernel, _fake
)
registration.differentiable(_NAME, _backward, _setup_context)
registration.autocast(_NAME)
