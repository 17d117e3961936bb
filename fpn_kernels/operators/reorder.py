"""`reorder`: a map copied into another layout, always into memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import dispatch, paths
from fpn_kernels.operators.checks import check_map
from fpn_kernels.operators.layouts import allocate
from fpn_kernels.operators.operator import Gradient, Operator

_REORDER = native.kernel("reorder")


class Reorder(NamedTuple):
    """`source` in `memory_format`, NCHW or NHWC."""

    source: Tensor
    memory_format: torch.memory_format

    def check(self) -> None:
        check_map("source", self.source)
        if self.memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(
                f"memory_format: expected torch.contiguous_format or torch.channels_last, got {self.memory_format}"
            )

    def allocate(self) -> Tensor:
        return allocate(self.source.shape, self.source, self.memory_format)

    def empty(self) -> Tensor | None:
        return self.allocate() if self.source.numel() == 0 else None

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: one pass, as PyTorch's copy"


def copy(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy in a layout, by the compiled library on the CPU."""
    out = allocate(source.shape, source, memory_format)
    _REORDER()(source, out)
    return out


def in_layout(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The map itself where it has the layout, else `copy`."""
    return source if source.is_contiguous(memory_format=memory_format) else copy(source, memory_format)


def _native(call: Reorder) -> Callable[[Reorder], Tensor]:
    return lambda call: copy(*call)


def _eager(call: Reorder) -> Tensor:
    return call.allocate().copy_(call.source)


def _standard(call: Reorder) -> Tensor:
    return call.source.clone() if paths.is_watched() else call.source.clone(memory_format=call.memory_format)


def _save(ctx: Any, call: Reorder, result: Tensor) -> None:
    """The backward needs nothing."""


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    # Values do not depend on the layout: the gradient is passed on as it is.
    return grad


REORDER = Operator(
    "reorder(Tensor source, *, MemoryFormat memory_format) -> Tensor",
    Reorder,
    {
        "native": dispatch.Implementation(_native, lambda call: native.cpu_refusal(call.source)),
        "eager": dispatch.eager(_eager),
    },
    standard=_standard,
    gradient=Gradient(_save, _backward),
    exported=True,
)
