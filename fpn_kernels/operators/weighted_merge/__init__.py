"""`weighted_merge`: ``sum of factors[i] * resize(maps[i], first's size)`` over two or three maps, and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.operators import dispatch
from fpn_kernels.operators.operator import Gradient, Operator
from fpn_kernels.operators.paths import path_of
from fpn_kernels.operators.sums import sum_dtype
from fpn_kernels.operators.upsample_add import UPSAMPLE_ADD_BACKWARD
from fpn_kernels.operators.upsample_add.standard import laid_out, resize
from fpn_kernels.operators.weighted_merge import cpu, eager, triton
from fpn_kernels.operators.weighted_merge.call import WeightedMerge, WeightedMergeBackward
from fpn_kernels.operators.weighted_merge.eager import divided, inner_product, normalized, scaled


def _standard(call: WeightedMerge) -> Tensor:
    first = call.first
    size, dtype = (first.shape[2], first.shape[3]), sum_dtype(first.dtype)
    factors = normalized(call.weights, first, call.normalization, call.eps)
    total = factors[0] * first.to(dtype)
    for index, other in enumerate(call.maps()[1:], start=1):
        total = total + factors[index] * resize(other.to(dtype), size, call.mode)
    return laid_out(total.to(first.dtype), first)


def _save(ctx: Any, call: WeightedMerge, result: Tensor) -> None:
    maps = (call.first, call.second, call.third)
    # Only the gradient of the weights reads the values of the maps.
    kept = maps if ctx.needs_input_grad[3] else [None] * len(maps)
    ctx.save_for_backward(call.weights, *kept)
    ctx.size = result.shape[2:]
    ctx.sizes = [None if tensor is None else tensor.shape[2:] for tensor in maps]
    ctx.mode, ctx.normalization, ctx.eps = call.mode, call.normalization, call.eps


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, *maps = ctx.saved_tensors
    wide, total = weights.to(sum_dtype(grad.dtype)), None
    # Normalised once, for the gradients of the maps and of the weights: on a GPU, each step is a launch.
    if ctx.normalization == "relu":
        factors, total = divided(wide, ctx.eps)
    else:
        factors = normalized(wide, grad, ctx.normalization, ctx.eps)
    wants_weights = ctx.wants[3]
    gradients: list[Tensor | None] = []
    grad_factors: list[Tensor] = []
    for index, (tensor, size) in enumerate(zip(maps, ctx.sizes, strict=True)):
        wants = ctx.wants[index]
        if size is None or not (wants or wants_weights):
            gradients.append(None)
            continue
        share = grad
        if size != ctx.size:
            # <grad, resize(input)> is <adjoint(grad), input>: both gradients of a coarse map are computed at its size.
            share = UPSAMPLE_ADD_BACKWARD.on(path_of(grad))(grad, size, mode=ctx.mode)
        if not wants_weights:
            gradients.append(scaled(share, factors[index]))
        elif wants:
            scaled_share, product = WEIGHTED_MERGE_BACKWARD(share, tensor, factors[index])
            gradients.append(scaled_share)
            grad_factors.append(product)
        else:
            gradients.append(None)
            grad_factors.append(inner_product(share, tensor))
    if not wants_weights:
        return *gradients, None
    grad_weights = _of_weights(torch.stack(grad_factors), wide, factors, total, ctx.normalization)
    return *gradients, grad_weights.to(weights.dtype)


def _of_weights(grad: Tensor, weights: Tensor, factors: Tensor, total: Tensor | None, normalization: str) -> Tensor:
    """The gradient of the weights from that of the factors, all in the dtype of the sums.  Differentiable.

    With ``r = relu(w)`` and ``total = sum(r) + eps``: ``df_i / dw_j = [w_j > 0] ([i = j] - f_i) / total``; of softmax
    ``df_i / dw_j = f_j ([i = j] - f_i)``.  ATen's fused steps are used where they exist: each is a launch on a GPU.
    """
    if normalization == "none":
        return grad
    result: Tensor
    if normalization == "softmax":
        result = torch.ops.aten._softmax_backward_data(grad, factors, 0, grad.dtype)
    else:
        assert total is not None
        centred = grad - (grad * factors).sum()
        # 0 where a weight is at most 0; NaN is propagated.
        result = torch.ops.aten.threshold_backward(centred / total, weights, 0)
    return result


WEIGHTED_MERGE = Operator(
    "weighted_merge(Tensor first, Tensor second, Tensor? third, Tensor weights, *, str mode='nearest', "
    "str normalization='none', float eps=0.0) -> Tensor",
    WeightedMerge,
    {
        "native": cpu.WEIGHTED_MERGE,
        "triton": triton.WEIGHTED_MERGE,
        "eager": dispatch.eager(eager.weighted_merge),
    },
    standard=_standard,
    gradient=Gradient(_save, _backward),
    cast=3,  # the weights keep their dtype under autocast
    exported=True,
)


def _standard_backward(call: WeightedMergeBackward) -> tuple[Tensor, Tensor]:
    return laid_out(scaled(call.grad, call.factor), call.grad), inner_product(call.grad, call.input)


def _save_backward(ctx: Any, call: WeightedMergeBackward, result: Any) -> None:
    ctx.save_for_backward(*call)


def _double_backward(ctx: Any, grad_of_scaled: Tensor, grad_of_product: Tensor) -> tuple[Tensor | None, ...]:
    grad, input, factor = ctx.saved_tensors
    wants_grad, wants_input, wants_factor = ctx.wants
    grad_of_grad = grad_of_input = grad_of_factor = None
    if wants_grad:
        # Both results are linear in grad: its gradient is a weighted merge of their gradients.
        factors = torch.stack((factor, grad_of_product))
        grad_of_grad = WEIGHTED_MERGE(grad_of_scaled, input, None, factors)
    if wants_input and wants_factor:
        # With the two gradients exchanged, it is the operator itself.
        grad_of_input, grad_of_factor = WEIGHTED_MERGE_BACKWARD(grad, grad_of_scaled, grad_of_product)
    elif wants_input:
        grad_of_input = scaled(grad, grad_of_product)
    elif wants_factor:
        grad_of_factor = inner_product(grad, grad_of_scaled)
    return grad_of_grad, grad_of_input, grad_of_factor


WEIGHTED_MERGE_BACKWARD = Operator(
    "weighted_merge_backward(Tensor grad, Tensor input, Tensor factor) -> (Tensor grad_input, Tensor grad_factor)",
    WeightedMergeBackward,
    {
        "native": cpu.WEIGHTED_MERGE_BACKWARD,
        "triton": triton.WEIGHTED_MERGE_BACKWARD,
        "eager": dispatch.eager(eager.weighted_merge_backward),
    },
    standard=_standard_backward,
    gradient=Gradient(_save_backward, _double_backward),
)
