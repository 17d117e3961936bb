"""A case made concrete: its tensors, the eager call, the fused call, and the least they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import TRAINING, Case
from benchmarks.options import DTYPES
from fpn_kernels.roofline import Cost


@dataclass
class Contender:
    """A call on the workload's inputs and the parameters that it holds itself."""

    call: Callable[..., Any]
    parameters: tuple[Tensor, ...] = ()


@dataclass
class Workload:
    """What a suite hands to the harness.

    Attributes:
        inputs: tensors, in the order in which both calls take them; all are differentiated in a training case.
        eager, fused: the baseline and the library's call.
        cost: minimal bytes and operations, forward or forward and backward as the case says.
        exact: whether the library promises eager's own bits in the forward.
        wide: eager's call with its sums in float32, where eager's own roundings to 16 bits may add up to more than
            the tolerance: the library is then compared with this one.
        differences: place of an input to the size of the sums that its gradient is a difference of.  Where these
            cancel, an error is still judged by them.
        depth: how many merges follow one another; what one rounds differently, the next carries on.
    """

    inputs: tuple[Tensor, ...]
    eager: Contender
    fused: Contender
    cost: Cost
    exact: bool = False
    wide: Contender | None = None
    differences: Mapping[int, float] = field(default_factory=dict)
    depth: int = 1


def dtype_of(case: Case) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[case.dtype])
    return dtype


class Maker:
    """Random tensors of a case: seeded, in its dtype and layout, on the device, differentiable in training."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype = dtype_of(case)
        self.generator = torch.Generator(device).manual_seed(2017)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _leaf(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).requires_grad_(self.case.direction == TRAINING)

    def map(self, channels: int, height: int, width: int) -> Tensor:
        values = self._random(self.case.batch, channels, height, width)
        return self._leaf(values.to(memory_format=memory_format(self.case.layout)))

    def weight(self, out_channels: int, in_channels: int, kernel_size: int = 1) -> Tensor:
        """Of a convolution, in the case's layout; scaled so that a result is of the order of 1, whatever its fan-in."""
        values = self._random(out_channels, in_channels, kernel_size, kernel_size)
        return self._leaf((values / (kernel_size * in_channels**0.5)).to(memory_format=memory_format(self.case.layout)))

    def fusion_weights(self, count: int) -> Tensor:
        """Of a weighted merge, before they are normalised; positive, so that each is differentiated."""
        return self._leaf(self._random(count).abs() + 0.5)

    def bias(self, channels: int) -> Tensor:
        return self._leaf(self._random(channels))


def memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "NHWC" else torch.contiguous_format


def place(module: nn.Module, case: Case, device: torch.device) -> nn.Module:
    """A module in the case's dtype and layout, with gradients for its parameters in a training case only."""
    # mypy does not know the overload of `to` that takes a memory format beside a dtype.
    module = module.to(device=device, dtype=dtype_of(case)).to(memory_format=memory_format(case.layout))  # type: ignore[call-overload]
    return module.requires_grad_(case.direction == TRAINING)


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a result, in order, whether it is one, a tuple or a mapping."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def training_step(contender: Contender, call: Callable[..., Any], grads: list[Tensor]) -> Callable[..., list[Tensor]]:
    """Forward, then the gradients of every input and parameter, as one call."""

    def step(*inputs: Tensor) -> list[Tensor]:
        outputs = tensors(call(*inputs))
        return list(torch.autograd.grad(outputs, [*inputs, *contender.parameters], grads))

    return step
