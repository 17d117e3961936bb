"""`fpn_kernels::weighted_merge`: ``sum of factors[i] * resize(inputs[i], first's size)`` over two or three maps.

The factors come normalised (`functional.weighted_merge`), so that the gradient of the normalisation is PyTorch's own.
They are a tensor on the maps' device, which no host ever reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.eager import inner_product, scaled
from fpn_kernels.backends.layouts import allocate, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_weighted_merge


def _inputs(first: Tensor, second: Tensor, third: Tensor | None) -> tuple[Tensor, ...]:
    return (first, second) if third is None else (first, second, third)


def _check(first: Tensor, second: Tensor, third: Tensor | None, factors: Tensor, mode: str) -> None:
    check_weighted_merge(_inputs(first, second, third), factors, mode)


def _allocate(first: Tensor, *_: object) -> Tensor:
    return allocate(first.shape, first, result_format(first))


def _kernel(first: Tensor, second: Tensor, third: Tensor | None, factors: Tensor, *, mode: str = "nearest") -> Tensor:
    arguments = (first, second, third, factors, mode)
    result: Tensor = serving.call("weighted_merge", *arguments, check=_check, empty=_allocate)
    return result


def _fake(first: Tensor, second: Tensor, third: Tensor | None, factors: Tensor, *, mode: str = "nearest") -> Tensor:
    _check(first, second, third, factors, mode)
    return _allocate(first)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    *maps, factors = inputs
    # Only the gradient of the factors reads the maps' values.
    kept = maps if ctx.needs_input_grad[3] else [None] * len(maps)
    ctx.save_for_backward(factors, *kept)
    ctx.size = output.shape[2:]
    ctx.sizes = [None if tensor is None else tensor.shape[2:] for tensor in maps]
    ctx.mode = keyword_only_inputs["mode"]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    factors, *maps = ctx.saved_tensors
    wants_factors = ctx.needs_input_grad[3]
    gradients: list[Tensor | None] = []
    grad_factors: list[Tensor] = []
    for index, (tensor, size) in enumerate(zip(maps, ctx.sizes, strict=True)):
        wants = ctx.needs_input_grad[index]
        if size is None or not (wants or wants_factors):
            gradients.append(None)
            continue
        share = grad
        if size != ctx.size:
            # <grad, resize(input)> is <adjoint(grad), input>: both gradients of a coarse map are made at its size.
            share = direct.operators(grad).upsample_add_backward(grad, size, mode=ctx.mode)
        if not wants_factors:
            gradients.append(scaled(share, factors[index]))
        elif wants:
            of = direct.operators(share, tensor, factors).weighted_merge_backward
            scaled_share, product = of(share, tensor, factors[index])
            gradients.append(scaled_share)
            grad_factors.append(product)
        else:
            gradients.append(None)
            grad_factors.append(inner_product(share, tensor))
    return *gradients, torch.stack(grad_factors) if wants_factors else None


_NAME = registration.define(
    "weighted_merge(Tensor first, Tensor second, Tensor? third, Tensor factors, *, str mode='nearest') -> Tensor",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
registration.autocast(_NAME, maps=3)
