"""`upsample_add` and its backward by the compiled library (on CUDA, too, but for `merge_backward`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.layouts import allocator, result_format
from fpn_kernels.operators.upsample_add.call import MergeBackward, UpsampleAdd, UpsampleAddBackward

_UPSAMPLE_ADD = native.kernel("upsample_add")
_UPSAMPLE_ADD_BACKWARD = native.kernel("upsample_add_backward")
_MERGE_BACKWARD = native.kernel("merge_backward")


def _refusal(call: UpsampleAdd | UpsampleAddBackward) -> str | None:
    return native.device_refusal(call[0])


def _plan(call: UpsampleAdd) -> Callable[[UpsampleAdd], Tensor]:
    new, mode = allocator(call.lateral.shape, result_format(call.lateral)), native.MODE_NUMBERS[call.mode]
    merge = _UPSAMPLE_ADD()

    def run(call: UpsampleAdd) -> Tensor:
        out = new(call.lateral)
        merge(call.top, call.lateral, mode, call.gain, out)
        return out

    return run


def _plan_backward(call: UpsampleAddBackward) -> Callable[[UpsampleAddBackward], Tensor]:
    new, mode = allocator(call.shape(), result_format(call.grad)), native.MODE_NUMBERS[call.mode]
    adjoint = _UPSAMPLE_ADD_BACKWARD()

    def run(call: UpsampleAddBackward) -> Tensor:
        grad_top = new(call.grad)
        adjoint(call.grad, mode, call.gain, grad_top)
        return grad_top

    return run


def _plan_merge_backward(call: MergeBackward) -> Callable[[MergeBackward], tuple[Tensor, Tensor]]:
    new, mode = allocator(call.adjoint().shape(), result_format(call.grad)), native.MODE_NUMBERS[call.mode]
    adjoint = _MERGE_BACKWARD()

    def run(call: MergeBackward) -> tuple[Tensor, Tensor]:
        grad, upstream = call.grad, call.upstream
        grad_top = new(grad)
        # The library sums in float64; the sum is rounded here, once.
        grad_bias = torch.empty(grad.shape[1], dtype=torch.float64, device="cpu")
        # The library adds an upstream gradient with the strides of the result in the same pass.
        alike = upstream is not None and upstream.stride() == grad_top.stride()
        adjoint(grad, upstream if alike else None, mode, call.gain, grad_top, grad_bias)
        if upstream is not None and not alike:
            grad_top.add_(upstream)
        return grad_top, grad_bias.to(grad.dtype)

    return run


UPSAMPLE_ADD = dispatch.Implementation(_plan, _refusal)
UPSAMPLE_ADD_BACKWARD = dispatch.Implementation(_plan_backward, _refusal)
MERGE_BACKWARD = dispatch.Implementation(_plan_merge_backward, lambda call: native.cpu_refusal(call.grad))
