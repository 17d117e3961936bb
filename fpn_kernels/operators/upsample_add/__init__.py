"""`upsample_add`: ``gain * (lateral + resize(top, lateral's size))``, and the two operators of its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fpn_kernels.operators import dispatch
from fpn_kernels.operators.operator import Gradient, Operator
from fpn_kernels.operators.paths import path_of
from fpn_kernels.operators.upsample_add import cpu, eager, standard, triton, triton_backward
from fpn_kernels.operators.upsample_add.call import MergeBackward, UpsampleAdd, UpsampleAddBackward


def _save(ctx: Any, call: UpsampleAdd, result: Tensor) -> None:
    ctx.top_size, ctx.mode, ctx.gain = call.top.shape[2:], call.mode, call.gain


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wants_top, wants_lateral = ctx.wants[:2]
    grad_top = grad_lateral = None
    if wants_top:
        grad_top = UPSAMPLE_ADD_BACKWARD.on(path_of(grad))(grad, ctx.top_size, mode=ctx.mode, gain=ctx.gain)
    if wants_lateral:
        grad_lateral = grad if ctx.gain == 1.0 else grad * ctx.gain
    return grad_top, grad_lateral


UPSAMPLE_ADD = Operator(
    "upsample_add(Tensor top, Tensor lateral, *, str mode='nearest', float gain=1.0) -> Tensor",
    UpsampleAdd,
    {
        "native": cpu.UPSAMPLE_ADD,
        "triton": triton.UPSAMPLE_ADD,
        "eager": dispatch.eager(eager.upsample_add),
    },
    standard=standard.upsample_add,
    gradient=Gradient(_save, _backward),
    cast=2,
    exported=True,
)


def _save_backward(ctx: Any, call: Any, result: Any) -> None:
    ctx.size, ctx.options = call.grad.shape, {"mode": call.mode, "gain": call.gain}


def _double_backward(ctx: Any, grad_of_top: Tensor) -> tuple[Tensor, None]:
    # The adjoint of the adjoint is the resize itself: a merge onto a lateral of zeros that has no storage to read.
    zeros = grad_of_top.new_zeros(()).expand(ctx.size)
    return UPSAMPLE_ADD(grad_of_top, zeros, **ctx.options), None


UPSAMPLE_ADD_BACKWARD = Operator(
    "upsample_add_backward(Tensor grad, SymInt[2] top_size, *, str mode='nearest', float gain=1.0) -> Tensor",
    UpsampleAddBackward,
    {
        "native": cpu.UPSAMPLE_ADD_BACKWARD,
        "triton": triton_backward.UPSAMPLE_ADD_BACKWARD,
        "eager": dispatch.eager(eager.upsample_add_backward),
    },
    standard=standard.upsample_add_backward,
    gradient=Gradient(_save_backward, _double_backward),
)


def _merge_double_backward(
    ctx: Any, grad_of_top: Tensor, grad_of_bias: Tensor
) -> tuple[Tensor | None, None, Tensor | None]:
    wants_grad, _, wants_upstream = ctx.wants[:3]
    grad_of_grad = None
    if wants_grad:
        # Both results are linear in grad: its gradient is gain * (resize(grad_of_top) + grad_of_bias), one merge.
        lateral = grad_of_bias.view(1, -1, 1, 1).expand(ctx.size)
        grad_of_grad = UPSAMPLE_ADD(grad_of_top, lateral, **ctx.options)
    return grad_of_grad, None, grad_of_top if wants_upstream else None


MERGE_BACKWARD = Operator(
    "merge_backward(Tensor grad, SymInt[2] top_size, Tensor? upstream, *, str mode='nearest', float gain=1.0) "
    "-> (Tensor grad_top, Tensor grad_bias)",
    MergeBackward,
    {
        "native": cpu.MERGE_BACKWARD,
        "triton": triton_backward.MERGE_BACKWARD,
        "eager": dispatch.eager(eager.merge_backward),
    },
    standard=standard.merge_backward,
    gradient=Gradient(_save_backward, _merge_double_backward),
)
