"""The calls of `output_conv`, `output_conv_levels` and `output_conv_backward_weight`: arguments, checks, results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_kernels.operators.checks import (
    check_alike,
    check_convolution,
    check_levels,
    check_map,
    check_memory_format,
    place_biases,
    shape_of,
)
from fpn_kernels.operators.layouts import allocate, requested_format


class OutputConv(NamedTuple):
    """``conv3x3(feature, weight) + bias``, stride 1, padding 1."""

    feature: Tensor
    weight: Tensor
    bias: Tensor | None
    memory_format: torch.memory_format | None = None

    def check(self) -> None:
        check_memory_format(self.memory_format)
        check_convolution("feature", self.feature, "weight", self.weight, "bias", self.bias, kernel_size=3)

    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return (self.feature.shape[0], self.weight.shape[0], *self.feature.shape[2:])

    def out_format(self) -> torch.memory_format:
        """The layout of the result."""
        return requested_format(self.feature, self.memory_format)

    def allocate(self) -> Tensor:
        return allocate(self.shape(), self.feature, self.out_format())

    def empty(self) -> Tensor | None:
        return self.allocate() if self.feature.numel() == 0 else None

    def as_levels(self) -> OutputConvLevels:
        """The call for a pyramid of this one level."""
        biases, levels = ([], []) if self.bias is None else ([self.bias], [0])
        return OutputConvLevels([self.feature], [self.weight], biases, levels, self.memory_format)

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by operations: Winograd's 16 products where the plain sum has 36, or PyTorch's own convolution"


class OutputConvLevels(NamedTuple):
    """`OutputConv` of each level; `biases` are those that exist, `bias_levels` their levels."""

    features: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    bias_levels: Sequence[int]
    memory_format: torch.memory_format | None = None

    def placed(self) -> list[Tensor | None]:
        """One bias or None per level."""
        return place_biases(self.biases, self.bias_levels, len(self.features))

    def convolutions(self) -> list[OutputConv]:
        """The call of each level."""
        levels = zip(self.features, self.weights, self.placed(), strict=True)
        return [OutputConv(*level, self.memory_format) for level in levels]

    def check(self) -> None:
        """Check every level before the first is computed; messages name the level."""
        features, weights, biases = self.features, self.weights, self.placed()
        check_memory_format(self.memory_format)
        check_levels(features, weights, biases)
        for level, (feature, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
            name = f"features[{level}]"
            check_convolution(name, feature, f"weights[{level}]", weight, f"biases[{level}]", bias, kernel_size=3)
            check_alike(name, feature, "features[0]", features[0])

    def allocate(self) -> list[Tensor]:
        return [each.allocate() for each in self.convolutions()]

    def empty(self) -> None:
        """Levels are empty one by one."""

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by operations: Winograd's 16 products where the plain sum has 36, or PyTorch's own convolution"


class OutputConvBackwardWeight(NamedTuple):
    """The gradients of the weight and the bias of a 3x3 convolution.

    ``grad_weight[o, i, ky, kx] = sum of grad[:, o, y, x] * feature[:, i, y + ky - 1, x + kx - 1]`` over the pixels, and
    ``grad_bias[o] = sum of grad[:, o]`` in the same pass, without elements if not `wants_bias`.
    """

    grad: Tensor
    feature: Tensor
    wants_bias: bool = True
    memory_format: torch.memory_format | None = None

    def check(self) -> None:
        grad, feature = self.grad, self.feature
        check_memory_format(self.memory_format)
        check_map("grad", grad)
        check_map("feature", feature)
        check_alike("feature", feature, "grad", grad)
        for name, tensor in (("grad", grad), ("feature", feature)):
            if tensor.shape[1] < 1:
                raise ValueError(f"{name}: expected at least one channel, got the shape {shape_of(tensor)}")
        if feature.shape[0] != grad.shape[0] or feature.shape[2:] != grad.shape[2:]:
            n, _, height, width = grad.shape
            raise ValueError(
                f"feature: expected the batch and size of grad, [{n}, Cin, {height}, {width}], got {shape_of(feature)}"
            )

    def out_format(self) -> torch.memory_format:
        """The layout of the weight's gradient."""
        return torch.channels_last if self.memory_format == torch.channels_last else torch.contiguous_format

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight's gradient."""
        return (self.grad.shape[1], self.feature.shape[1], 3, 3)

    def allocate(self) -> tuple[Tensor, Tensor]:
        grad_weight = allocate(self.shape(), self.grad, self.out_format())
        return grad_weight, self.grad.new_empty(self.grad.shape[1] if self.wants_bias else 0)

    def empty(self) -> tuple[Tensor, Tensor] | None:
        if self.grad.numel() > 0:
            return None
        grad_weight, grad_bias = self.allocate()
        return grad_weight.zero_(), grad_bias.zero_()

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by operations: as the convolution's, or PyTorch's own gradient"
