"""`fpn_kernels::reorder`: a map copied into another layout, always into memory of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.layouts import allocate
from fpn_kernels.operators import registration
from fpn_kernels.operators.checks import check_reorder


def _kernel(source: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    result: Tensor = serving.call("reorder", source, memory_format, check=check_reorder, empty=_allocate)
    return result


def _allocate(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    return allocate(source.shape, source, memory_format)


def _fake(source: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    check_reorder(source, memory_format)
    return _allocate(source, memory_format)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    # Values do not depend on the layout: the gradient is passed on in the one that it came in.
    return grad


_NAME = registration.define("reorder(Tensor source, *, MemoryFormat memory_format) -> Tensor", _kernel, _fake)
registration.differentiable(_NAME, _backward, _setup_context)
