"""The call of `lateral_connection`: arguments, checks and result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fpn_kernels.operators.checks import (
    check_alike,
    check_convolution,
    check_map,
    check_memory_format,
    check_mode,
    shape_of,
)
from fpn_kernels.operators.layouts import allocate, requested_format


class LateralConnection(NamedTuple):
    """``gain * (conv1x1(feature) + bias + resize(top, feature's size))``; without `top`, no gain."""

    feature: Tensor
    weight: Tensor
    bias: Tensor | None
    top: Tensor | None
    mode: str = "nearest"
    gain: float = 1.0
    memory_format: torch.memory_format | None = None

    def check(self) -> None:
        feature, weight, top = self.feature, self.weight, self.top
        check_mode(self.mode)
        check_memory_format(self.memory_format)
        check_convolution("feature", feature, "weight", weight, "bias", self.bias)
        if top is None:
            return
        check_map("top", top)
        check_alike("top", top, "feature", feature)
        if top.shape[0] != feature.shape[0] or top.shape[1] != weight.shape[0]:
            raise ValueError(
                f"top: expected the batch of feature and the output channels of weight, "
                f"[{feature.shape[0]}, {weight.shape[0]}, h, w], got {shape_of(top)}"
            )

    def matrix(self) -> Tensor:
        """The weight as ``[Cout, Cin]``."""
        return self.weight.flatten(1)

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

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        if self.bias is None and self.top is None:
            return "by operations: a product of as many operations as PyTorch's"
        return "by bytes: one pass for product, bias and merge, where PyTorch takes up to four"
