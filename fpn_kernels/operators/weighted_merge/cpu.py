"""`weighted_merge` and its backward by the compiled library, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.layouts import allocator, result_format
from fpn_kernels.operators.weighted_merge.call import WeightedMerge, WeightedMergeBackward
from fpn_kernels.operators.weighted_merge.eager import normalized

_WEIGHTED_MERGE = native.kernel("weighted_merge")
_WEIGHTED_MERGE_BACKWARD = native.kernel("weighted_merge_backward")


def _refusal(call: WeightedMerge | WeightedMergeBackward) -> str | None:
    return native.cpu_refusal(call[0])


def _plan(call: WeightedMerge) -> Callable[[WeightedMerge], Tensor]:
    new, mode = allocator(call.first.shape, result_format(call.first)), native.MODE_NUMBERS[call.mode]
    merge, relu, eps = _WEIGHTED_MERGE(), call.normalization == "relu", call.eps
    # The library normalises these; softmax is left to PyTorch, whose exponential differs from the C library's in bits.
    read_as_given = call.normalization != "softmax" and call.weights.dtype in (torch.float32, torch.float64)
    normalization = "none" if relu else call.normalization

    def run(call: WeightedMerge) -> Tensor:
        first, second, third, weights, *_ = call
        out = new(first)
        if not read_as_given:
            weights = normalized(weights, first, normalization, eps)
        merge(first, second, third, weights, relu, eps, mode, out)
        return out

    return run


def _plan_backward(
    call: WeightedMergeBackward,
) -> Callable[[WeightedMergeBackward], tuple[Tensor, Tensor]]:
    new = allocator(call.grad.shape, result_format(call.grad))
    adjoint = _WEIGHTED_MERGE_BACKWARD()

    def run(call: WeightedMergeBackward) -> tuple[Tensor, Tensor]:
        grad, input, factor = call
        grad_input = new(grad)
        # The library sums in float64; the sum is rounded here, once.
        grad_factor = torch.empty((), dtype=torch.float64, device="cpu")
        adjoint(grad, input, factor, grad_input, grad_factor)
        return grad_input, grad_factor.to(factor.dtype)

    return run


WEIGHTED_MERGE = dispatch.Implementation(_plan, _refusal)
WEIGHTED_MERGE_BACKWARD = dispatch.Implementation(_plan_backward, _refusal)
