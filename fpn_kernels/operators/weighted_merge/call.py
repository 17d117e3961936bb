"""The calls of `weighted_merge` and of its backward: arguments, checks and results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fpn_kernels.operators.checks import (
    NORMALIZATIONS,
    check_alike,
    check_device,
    check_map,
    check_mode,
    check_normalization,
    check_sum_dtype,
    check_weights,
    shape_of,
)
from fpn_kernels.operators.layouts import allocate, result_format


class WeightedMerge(NamedTuple):
    """``sum of factors[i] * resize(maps[i], first's size)`` over two or three maps.

    The factors are computed from the weights, a tensor on the maps' device that the host never reads.  `normalization`
    is "relu" (``r / (sum(r) + eps)`` with ``r = relu(weights)``), "softmax", or "none": the weights themselves.
    """

    first: Tensor
    second: Tensor
    third: Tensor | None
    weights: Tensor
    mode: str = "nearest"
    normalization: str = "none"
    eps: float = 0.0

    def maps(self) -> tuple[Tensor, ...]:
        return (self.first, self.second) if self.third is None else (self.first, self.second, self.third)

    def check(self) -> None:
        check_mode(self.mode)
        check_normalization(self.normalization, self.eps, (*NORMALIZATIONS, "none"))
        first, *others = self.maps()
        check_map("inputs[0]", first)
        for index, tensor in enumerate(others, start=1):
            name = f"inputs[{index}]"
            check_map(name, tensor)
            check_alike(name, tensor, "inputs[0]", first)
            if tensor.shape[0] != first.shape[0] or tensor.shape[1] != first.shape[1]:
                raise ValueError(
                    f"{name}: expected the batch and channels of inputs[0], "
                    f"[{first.shape[0]}, {first.shape[1]}, h, w], got {shape_of(tensor)}"
                )
        check_weights("weights", self.weights, 1 + len(others))
        if self.normalization == "none":
            check_sum_dtype("weights", self.weights, first)
        else:
            check_device("weights", self.weights, first)

    def allocate(self) -> Tensor:
        return allocate(self.first.shape, self.first, result_format(self.first))

    def empty(self) -> Tensor | None:
        return self.allocate() if self.first.numel() == 0 else None

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: one pass where PyTorch takes one per product, resize and sum"


class WeightedMergeBackward(NamedTuple):
    """The gradients of one input and of its factor, in one pass: ``factor * grad`` and the sum of ``grad * input``.

    `grad` has the size of `input`: for a resized input it is the adjoint of the resize.
    """

    grad: Tensor
    input: Tensor
    factor: Tensor

    def check(self) -> None:
        grad, input, factor = self
        check_map("grad", grad)
        check_map("input", input)
        check_alike("input", input, "grad", grad)
        if input.shape != grad.shape:
            raise ValueError(f"input: expected the shape of grad, {shape_of(grad)}, got {shape_of(input)}")
        if factor.dim() != 0:
            raise ValueError(f"factor: expected a single number (no dimensions), got the shape {shape_of(factor)}")
        check_sum_dtype("factor", factor, grad)

    def allocate(self) -> tuple[Tensor, Tensor]:
        return allocate(self.grad.shape, self.grad, result_format(self.grad)), torch.empty_like(self.factor)

    def empty(self) -> tuple[Tensor, Tensor] | None:
        if self.grad.numel() > 0:
            return None
        grad_input, grad_factor = self.allocate()
        return grad_input, grad_factor.zero_()

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: one pass where PyTorch takes three"
