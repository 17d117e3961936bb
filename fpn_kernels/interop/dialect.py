"""The interface of a dialect (a foreign feature pyramid), and the functions that dialects share."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.alterations import defining_class, runs_own_forward
from fpn_kernels.modules.fusing import Parameters, convolution_parameters, fused_parameters
from fpn_kernels.resampling import MODES


class Dialect(abc.ABC):
    """One foreign feature pyramid.

    Attributes:
        name: its name in reports and errors.
        packages: the top-level packages that define it.
        class_names: names of the class that defines its forward; None if only the structure identifies it.
        parts: the typed attributes that a module of this dialect has: their type and names.
        options: its other attributes.
        forwards: the candidates for its fused forward; the first that reproduces the module's results is chosen.
        decorators: modules whose decorators of a forward do not change its result.
    """

    name: str
    packages: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    parts: tuple[tuple[type, tuple[str, ...]], ...]
    options: tuple[str, ...] = ()
    forwards: tuple[type[FusedForward], ...]
    decorators: tuple[str, ...] = ()

    def fits(self, module: Any) -> bool:
        """Whether the module has the attributes of this dialect."""
        required = [(name, kind) for kind, names in (*self.parts, (object, self.options)) for name in names]
        return all(hasattr(module, name) and isinstance(getattr(module, name), kind) for name, kind in required)

    def refusal(self, module: Any) -> str | None:
        """The option that is not supported, with the reason; or None."""
        return None

    def nothing_to_do(self, module: Any) -> str | None:
        """Why fusing this module would change nothing; or None."""
        return None

    @abc.abstractmethod
    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        """Small random arguments of a call."""

    def stand_ins(self, module: Any, random: Random) -> Mapping[str, nn.Module]:
        """Submodules that a trial of the forward need not run, by name, and their replacements."""
        return {}


class Random:
    """Random values on the CPU from a separate generator."""

    def __init__(self) -> None:
        self._generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def positive(self, *shape: int) -> Tensor:
        """Uniform between 0.5 and 1.5, float32: usable as a scale or a variance."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu") + 0.5

    def pyramid(self, channels: Sequence[int], *, exact: bool) -> list[Tensor]:
        """Maps of two images, finest first, with sizes that double exactly or with odd sizes."""
        sizes = [(3, 5)]
        while len(sizes) < len(channels):
            h, w = sizes[-1]
            sizes.append((2 * h, 2 * w) if exact else (2 * h - 1, 2 * w - len(sizes) % 2))
        return [self.normal(2, c, *size) for c, size in zip(channels, reversed(sizes), strict=True)]


def in_channels(block: nn.Module) -> int:
    """Input channels of the first convolution in a block."""
    return _channels(block, "in_channels")[0]


def out_channels(block: nn.Module) -> int:
    """Output channels of the last convolution in a block."""
    return _channels(block, "out_channels")[-1]


def _channels(block: nn.Module, name: str) -> list[int]:
    found = [value for module in block.modules() if isinstance(value := getattr(module, name, None), int)]
    if not found:
        raise ValueError(f"{type(block).__name__} holds no convolution")
    return found


def resize_refusal(option: str, mode: Any, *, align_corners: Any = None, scale_factor: Any = None) -> str | None:
    """Why a resize is not supported, in terms of the user's option; or None."""
    if mode not in MODES:
        return f"{option}: mode {mode!r} is not one of {', '.join(map(repr, MODES))}"
    if align_corners:
        return f"{option}: align_corners={align_corners!r} is not supported"
    if scale_factor is not None and (scale_factor != int(scale_factor) or scale_factor < 1):
        return f"{option}: scale_factor={scale_factor!r} is not a whole number"
    return None


def block_parameters(block: Any, kernel_size: int) -> Parameters | None:
    """`fused_parameters` for the blocks of all dialects.

    Recognises Detectron2's ``Conv2d`` (its norm is a child of the convolution), MMCV's ``ConvModule`` and
    EfficientDet's ``ConvBnAct2d`` by class name and attributes.  A block with an activation, another order or hooks has
    no fused parameters.

    Args:
        block: a lateral or output block.
        kernel_size: as in `fused_parameters`.
    """
    name = defining_class(type(block)).__name__
    if name == "Conv2d" and isinstance(block, nn.Conv2d) and hasattr(block, "norm") and hasattr(block, "activation"):
        parts = (block, block.norm) if block.activation is None else None
    elif name == "ConvModule":
        parts = _parts_of_conv_module(block)
    elif name == "ConvBnAct2d":
        parts = (block.conv, block.bn) if getattr(block, "act", None) is None else None
    else:
        return fused_parameters(block, kernel_size)
    if parts is None or not runs_own_forward(block) or not isinstance(parts[1], nn.Module | None):
        return None
    if parts[0] is block:
        return convolution_parameters(*parts, kernel_size, forward=type(block).forward)
    return convolution_parameters(*parts, kernel_size)


def _parts_of_conv_module(block: Any) -> tuple[Any, Any] | None:
    if getattr(block, "with_activation", True) or getattr(block, "with_explicit_padding", False):
        return None
    if not getattr(block, "with_norm", True):
        return block.conv, None
    order = tuple(getattr(block, "order", ("conv", "norm", "act")))
    return None if order.index("norm") < order.index("conv") else (block.conv, block.norm)
