"""`fpn_kernels::weighted_merge`: ``sum of factors[i] * resize(inputs[i], first's size)`` over two or three maps.

The factors are made of the weights, a tensor on the maps' device that no host ever reads, where they are used: with
``r = relu(weights)``, ``factors = r / (sum(r) + eps)``, or ``softmax(weights)``, or ("none") the weights themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.eager import divided, inner_product, normalized, scaled
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_weighted_merge, sum_dtype


def _inputs(first: Tensor, second: Tensor, third: Tensor | None) -> tuple[Tensor, ...]:
    return (first, second) if third is None else (first, second, third)


def _check(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    mode: str,
    normalization: str,
    eps: float,
) -> None:
    check_weighted_merge(_inputs(first, second, third), weights, mode, normalization, eps)


def _allocate(first: Tensor, *_: object) -> Tensor:
    return allocate(first.shape, first, result_format(first))


def _kernel(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    *,
    mode: str = "nearest",
    normalization: str = "none",
    eps: float = 0.0,
) -> Tensor:
    arguments = (first, second, third, weights, mode, normalization, eps)
    result: Tensor = serving.call("weighted_merge", *arguments, check=_check, empty=_allocate)
    return result


def _fake(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    *,
    mode: str = "nearest",
    normalization: str = "none",
    eps: float = 0.0,
) -> Tensor:
    _check(first, second, third, weights, mode, normalization, eps)
    return _allocate(first)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    *maps, weights = inputs
    # Only the gradient of the weights reads the maps' values.
    kept = maps if ctx.needs_input_grad[3] else [None] * len(maps)
    ctx.save_for_backward(weights, *kept)
    ctx.size = output.shape[2:]
    ctx.sizes = [None if tensor is None else tensor.shape[2:] for tensor in maps]
    ctx.mode = keyword_only_inputs["mode"]
    ctx.normalization, ctx.eps = keyword_only_inputs["normalization"], keyword_only_inputs["eps"]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, *maps = ctx.saved_tensors
    wide, total = weights.to(sum_dtype(grad)), None
    # Normalised once, for the gradients of the maps and of the weights: on a GPU each step is a launch.
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
            # <grad, resize(input)> is <adjoint(grad), input>: both gradients of a coarse map are made at its size.
            share = direct.operators(grad).upsample_add_backward(grad, size, mode=ctx.mode)
        if not wants_weights:
            gradients.append(scaled(share, factors[index]))
        elif wants:
            of = direct.operators(share, tensor, factors).weighted_merge_backward
            scaled_share, product = of(share, tensor, factors[index])
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
    ``df_i / dw_j = f_j ([i = j] - f_i)``.  ATen's own steps, where it has one for several: each is a launch on a GPU.
    """
    if normalization == "none":
        return grad
    result: Tensor
    if normalization == "softmax":
        result = torch.ops.aten._softmax_backward_data(grad, factors, 0, grad.dtype)
    else:
        assert total is not None
        centred = grad - (grad * factors).sum()
        # 0 where a weight is at most 0: what is not a number is handed on.
        result = torch.ops.aten.threshold_backward(centred / total, weights, 0)
    return result


_NAME = registration.define(
    "weighted_merge(Tensor first, Tensor second, Tensor? third, Tensor weights, *, str mode='nearest', "
    "str normalization='none', float eps=0.0) -> Tensor",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
registration.autocast(_NAME, maps=3)
