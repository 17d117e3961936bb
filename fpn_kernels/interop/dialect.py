"""What a dialect has to tell: which modules speak it, which options it cannot serve, and how it is computed."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.resampling import MODES


class Dialect(abc.ABC):
    """One foreign feature pyramid.

    Attributes:
        name: what reports and errors call it.
        packages: the top-level packages that define it.
        class_names: names of the class that defines its forward; None where it is told by its structure alone.
        forwards: the fused forwards it may have; the one that gives the module's own results is taken.
        decorators: modules whose decorators of a forward change nothing that the fused forward does not see to.
    """

    name: str
    packages: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    forwards: tuple[type[FusedForward], ...]
    decorators: tuple[str, ...] = ()

    @abc.abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether the module has the attributes and submodules of this dialect."""

    def refusal(self, module: nn.Module) -> str | None:
        """Which option cannot be served, and why; or None."""
        return None

    def nothing_to_do(self, module: nn.Module) -> str | None:
        """Why the fused calls have nothing to offer this module; or None."""
        return None

    @abc.abstractmethod
    def example(self, module: nn.Module, random: Random) -> tuple[Any, ...]:
        """Small random arguments of a call."""

    def stand_ins(self, module: nn.Module, random: Random) -> Mapping[str, nn.Module]:
        """Submodules that need not run in a trial of the forward, by name, and what runs in their place."""
        return {}


class Random:
    """Random values on the CPU from a generator of their own, so that no seed of the caller's is moved."""

    def __init__(self) -> None:
        self._generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def positive(self, *shape: int) -> Tensor:
        """Uniform between 0.5 and 1.5, float32: fit to be a scale or a variance."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu") + 0.5

    def pyramid(self, channels: Sequence[int], *, exact: bool) -> list[Tensor]:
        """Maps of two images, finest first; sizes that double exactly, or else odd ones."""
        sizes = [(3, 5)]
        while len(sizes) < len(channels):
            h, w = sizes[-1]
            sizes.append((2 * h, 2 * w) if exact else (2 * h - 1, 2 * w - len(sizes) % 2))
        return [self.normal(2, c, *size) for c, size in zip(channels, reversed(sizes), strict=True)]


def has_attributes(module: nn.Module, *names: str) -> bool:
    """Whether the module has all of these, of any value."""
    return all(hasattr(module, name) for name in names)


def in_channels(block: nn.Module) -> int:
    """Channels of the map that the first convolution of a block takes."""
    for module in block.modules():
        channels = getattr(module, "in_channels", None)
        if isinstance(channels, int):
            return channels
    raise ValueError(f"{type(block).__name__} holds no convolution")


def out_channels(block: nn.Module) -> int:
    """Channels of the map that the last convolution of a block gives."""
    channels = [getattr(module, "out_channels", None) for module in block.modules()]
    known = [each for each in channels if isinstance(each, int)]
    if not known:
        raise ValueError(f"{type(block).__name__} holds no convolution")
    return known[-1]


def resize_refusal(option: str, mode: Any, *, align_corners: Any = None, scale_factor: Any = None) -> str | None:
    """Why a resize cannot be served, in terms of the option that asks for it; or None."""
    if mode not in MODES:
        return f"{option}: mode {mode!r} is not one of {', '.join(map(repr, MODES))}"
    if align_corners:
        return f"{option}: align_corners={align_corners!r} is not served"
    if scale_factor is not None and (scale_factor != int(scale_factor) or scale_factor < 1):
        return f"{option}: scale_factor={scale_factor!r} is not a whole number"
    return None
