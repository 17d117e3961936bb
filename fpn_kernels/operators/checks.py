"""Checks of arguments that several operators share, made before anything is launched and while tracing.

Each message names the argument, what was expected and what it got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.operators.sums import sum_dtype
from fpn_kernels.resampling import MODES

NORMALIZATIONS = ("relu", "softmax")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def check_map(name: str, tensor: Tensor) -> None:
    """A dense floating-point map [N, C, H, W] with at least one pixel."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a tensor of dtype float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got {tensor.dim()}: {shape_of(tensor)}")
    if tensor.shape[2] < 1 or tensor.shape[3] < 1:
        raise ValueError(f"{name}: expected at least one pixel, got the shape {shape_of(tensor)}")


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """The dtype (if `dtype`) and the device of another argument."""
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")


def check_memory_format(memory_format: torch.memory_format | None) -> None:
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format: expected torch.preserve_format, torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )


def check_normalization(normalization: object, eps: object, known: Sequence[str] = NORMALIZATIONS) -> None:
    """How the weights of a merge are normalised."""
    if normalization not in known:
        wanted = ", ".join(map(repr, known))
        raise ValueError(f"normalization: expected one of {wanted}, got {normalization!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")


def check_weights(name: str, weights: Tensor, count: int) -> None:
    """One floating-point number for each of `count` maps."""
    if not weights.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {weights.dtype}")
    if weights.dim() != 1 or weights.shape[0] != count:
        raise ValueError(f"{name}: expected the shape [{count}], one number per map, got {shape_of(weights)}")


def check_sum_dtype(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != sum_dtype(like.dtype):
        raise TypeError(
            f"{name}: expected {sum_dtype(like.dtype)}, in which maps of {like.dtype} are summed, got {tensor.dtype}"
        )
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected the device of the maps, {like.device}, got {tensor.device}")


def check_convolution(
    feature_name: str,
    feature: Tensor,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    *,
    kernel_size: int = 1,
    dtype: bool = True,
) -> None:
    """A map, and the weight and bias of a convolution over it with a square kernel."""
    check_map(feature_name, feature)
    if feature.shape[1] < 1:
        raise ValueError(f"{feature_name}: expected at least one channel, got the shape {shape_of(feature)}")
    check_alike(weight_name, weight, feature_name, feature, dtype=dtype)
    k = kernel_size
    wanted = f"[Cout, {feature.shape[1]}, {k}, {k}]"
    kernel_fits = weight.dim() == 4 and weight.shape[2] == k and weight.shape[3] == k
    if k == 1:
        wanted += f" or [Cout, {feature.shape[1]}]"
        kernel_fits = kernel_fits or weight.dim() == 2
    if not kernel_fits or weight.shape[1] != feature.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{weight_name}: expected the shape {wanted}, got {shape_of(weight)}")
    if bias is None:
        return
    check_alike(bias_name, bias, feature_name, feature, dtype=dtype)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{bias_name}: expected the shape [{weight.shape[0]}], got {shape_of(bias)}")


def check_levels(features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """At least one level, and one weight and one bias or None per level."""
    if len(features) == 0:
        raise ValueError("features: expected at least one map, got none")
    for name, values in (("weights", weights), ("biases", biases)):
        if len(values) != len(features):
            raise ValueError(f"{name}: expected {len(features)} (one per level), got {len(values)}")


def place_biases(biases: Sequence[Tensor], levels: Sequence[int], count: int) -> list[Tensor | None]:
    """One bias or None per level, from the biases that exist and their levels."""
    if len(biases) != len(levels):
        raise ValueError(f"bias_levels: expected {len(biases)} (one per bias), got {list(levels)}")
    placed: list[Tensor | None] = [None] * count
    for bias, level in zip(biases, levels, strict=True):
        if not 0 <= level < count:
            raise ValueError(f"bias_levels: expected levels below {count}, got {list(levels)}")
        placed[level] = bias
    return placed
