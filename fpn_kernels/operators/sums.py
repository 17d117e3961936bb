"""Sums over maps in the dtype that holds them: float32 for 16-bit maps."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maps of `dtype` are summed."""
    return torch.float32 if dtype in HALVES else dtype


def sum_per_channel(grad: Tensor, gain: float) -> Tensor:
    """``gain * sum of grad[:, c]`` per channel: the gradient of a bias, rounded once.  Differentiable."""
    return (grad.sum((0, 2, 3), dtype=sum_dtype(grad.dtype)) * gain).to(grad.dtype)
