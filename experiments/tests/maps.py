"""Random operands, and the check of a result against float64."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from torch import Tensor

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def random_map(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nhwc") -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[layout])


def random_weight(out_channels: int, in_channels: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(out_channels, in_channels) / in_channels**0.5).to(dtype)


def transposed(weight: Tensor) -> Tensor:
    """The same numbers with the strides of the weight in the gradient of the feature."""
    return weight.t().contiguous().t()


def filled(value: float, feature: Tensor, out_channels: int, layout: str = "nhwc") -> Tensor:
    """A result before the launch."""
    shape = (feature.shape[0], out_channels, *feature.shape[2:])
    out = torch.full(shape, value, dtype=feature.dtype, device=feature.device)
    return out.contiguous(memory_format=FORMATS[layout])


def check(out: Tensor, call: dict[str, Any], mode: str, gain: float) -> None:
    """Within one rounding of the result and a few roundings of the float32 sum; NaN fails."""
    exact = oracle.lateral_connection(call["feature"], call["weight"], call["bias"], call["top"], mode, gain)
    oracle.within_rounding(out, exact, 8.0)
