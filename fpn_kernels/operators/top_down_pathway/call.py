"""The call of `top_down_pathway`: arguments, checks and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_kernels.operators.checks import (
    check_alike,
    check_convolution,
    check_levels,
    check_memory_format,
    check_mode,
    place_biases,
)
from fpn_kernels.operators.lateral_connection.call import LateralConnection


class TopDownPathway(NamedTuple):
    """One lateral connection per level, finest level first; `biases` are those that exist, `bias_levels` their levels.

    A list with None among its tensors would have no autograd, hence the two lists.
    """

    features: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    bias_levels: Sequence[int]
    mode: str = "nearest"
    gain: float = 1.0
    memory_format: torch.memory_format | None = None

    def placed(self) -> list[Tensor | None]:
        """One bias or None per level."""
        return place_biases(self.biases, self.bias_levels, len(self.features))

    def connections(self, tops: Sequence[Tensor | None]) -> list[LateralConnection]:
        """The call of each level, with these tops."""
        options = (self.mode, self.gain, self.memory_format)
        levels = zip(self.features, self.weights, self.placed(), tops, strict=True)
        return [LateralConnection(*level, *options) for level in levels]

    def check(self) -> None:
        """Check every level before the first is computed; messages name the level."""
        features, weights, biases = self.features, self.weights, self.placed()
        check_mode(self.mode)
        check_memory_format(self.memory_format)
        check_levels(features, weights, biases)
        for level, (feature, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
            name = f"features[{level}]"
            check_convolution(name, feature, f"weights[{level}]", weight, f"biases[{level}]", bias)
            check_alike(name, feature, "features[0]", features[0])
            batch, channels = features[0].shape[0], weights[0].shape[0]
            if feature.shape[0] != batch:
                raise ValueError(f"{name}: expected the batch of features[0], {batch}, got {feature.shape[0]}")
            if weight.shape[0] != channels:
                raise ValueError(
                    f"weights[{level}]: expected the output channels of weights[0], {channels}, got {weight.shape[0]}"
                )

    def allocate(self) -> list[Tensor]:
        return [each.allocate() for each in self.connections([None] * len(self.features))]

    def empty(self) -> list[Tensor] | None:
        return self.allocate() if self.features[0].shape[0] == 0 else None

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: as its lateral connections, in overlapping launches"
