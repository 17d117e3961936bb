"""`weighted_merge` and its backward by plain PyTorch: every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_kernels.operators.layouts import result_format
from fpn_kernels.operators.sums import HALVES, sum_dtype
from fpn_kernels.operators.upsample_add.eager import resize
from fpn_kernels.operators.weighted_merge.call import WeightedMerge, WeightedMergeBackward


def normalized(weights: Tensor, like: Tensor, normalization: str, eps: float) -> Tensor:
    """The factors of maps like `like`: the normalised weights in the dtype of the sums.  Differentiable."""
    weights = weights.to(sum_dtype(like.dtype))
    if normalization == "relu":
        return divided(weights, eps)[0]
    return torch.softmax(weights, 0) if normalization == "softmax" else weights


def divided(weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The positive parts of weights divided by the total of their sum and eps; and that total."""
    positive = torch.relu(weights)
    total = positive.sum() + eps
    return positive / total, total


def weighted_merge(call: WeightedMerge) -> Tensor:
    first = call.first
    factors = normalized(call.weights, first, call.normalization, call.eps)
    out = call.allocate()
    size = (first.shape[2], first.shape[3])
    sums = out if out.dtype not in HALVES else torch.empty_like(out, dtype=torch.float32)
    torch.mul(first.to(sums.dtype), factors[0], out=sums)
    for index, other in enumerate(call.maps()[1:], start=1):
        other = other.to(sums.dtype)
        resized = other if other.shape == first.shape else resize(other, size, call.mode)
        sums.add_(resized * factors[index])
    return out if sums is out else out.copy_(sums)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of two maps, summed in float32 (float64 for float64).  Differentiable."""
    dtype = sum_dtype(left.dtype)
    return (left.to(dtype) * right.to(dtype)).sum()


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``factor * grad``, rounded once.  Differentiable.

    The factor of 16-bit maps is float32; only on the CPU is PyTorch known not to round such a scalar to 16 bits first.
    """
    return (grad.to(factor.dtype) * factor).to(grad.dtype)


def weighted_merge_backward(call: WeightedMergeBackward) -> tuple[Tensor, Tensor]:
    grad, input, factor = call
    return scaled(grad, factor).contiguous(memory_format=result_format(grad)), inner_product(grad, input)
