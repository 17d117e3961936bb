"""What an operator accepts, checked before anything is launched, on every backend and while tracing.

Each message names the argument, what was wanted and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.resampling import MODES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def check_map(name: str, tensor: Tensor) -> None:
    """A dense floating-point map [N, C, H, W] with at least one pixel."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a tensor of dtype float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got {tensor.dim()}: {_shape(tensor)}")
    if tensor.shape[2] < 1 or tensor.shape[3] < 1:
        raise ValueError(f"{name}: expected at least one pixel, got the shape {_shape(tensor)}")


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """The dtype (unless told otherwise) and the device of another argument."""
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


def check_reorder(source: Tensor, memory_format: torch.memory_format) -> None:
    check_map("source", source)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected torch.contiguous_format or torch.channels_last, got {memory_format}")


def check_output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> None:
    check_memory_format(memory_format)
    check_pointwise("feature", feature, "weight", weight, "bias", bias, kernel_size=3)


def check_upsample_add(top: Tensor, lateral: Tensor, mode: str) -> None:
    check_mode(mode)
    check_map("top", top)
    check_map("lateral", lateral)
    check_alike("top", top, "lateral", lateral)
    if top.shape[0] != lateral.shape[0] or top.shape[1] != lateral.shape[1]:
        raise ValueError(
            f"top: expected the batch and channels of lateral, [{lateral.shape[0]}, {lateral.shape[1]}, h, w], "
            f"got {_shape(top)}"
        )


def check_adjoint(grad: Tensor, top_size: Sequence[int], mode: str) -> None:
    check_mode(mode)
    check_map("grad", grad)
    if len(top_size) != 2 or top_size[0] < 1 or top_size[1] < 1:
        raise ValueError(f"top_size: expected two sizes of at least 1, got {list(top_size)}")


def check_lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    mode: str,
    memory_format: torch.memory_format | None,
) -> None:
    check_mode(mode)
    check_memory_format(memory_format)
    check_pointwise("feature", feature, "weight", weight, "bias", bias)
    if top is None:
        return
    check_map("top", top)
    check_alike("top", top, "feature", feature)
    if top.shape[0] != feature.shape[0] or top.shape[1] != weight.shape[0]:
        raise ValueError(
            f"top: expected the batch of feature and the output channels of weight, "
            f"[{feature.shape[0]}, {weight.shape[0]}, h, w], got {_shape(top)}"
        )


def check_pointwise(
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
    """A map and the weight and bias of a convolution over it (1x1 unless told otherwise)."""
    check_map(feature_name, feature)
    if feature.shape[1] < 1:
        raise ValueError(f"{feature_name}: expected at least one channel, got the shape {_shape(feature)}")
    check_alike(weight_name, weight, feature_name, feature, dtype=dtype)
    k = kernel_size
    wanted = f"[Cout, {feature.shape[1]}, {k}, {k}]"
    kernel_fits = weight.dim() == 4 and weight.shape[2] == k and weight.shape[3] == k
    if k == 1:
        wanted += f" or [Cout, {feature.shape[1]}]"
        kernel_fits = kernel_fits or weight.dim() == 2
    if not kernel_fits or weight.shape[1] != feature.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{weight_name}: expected the shape {wanted}, got {_shape(weight)}")
    if bias is None:
        return
    check_alike(bias_name, bias, feature_name, feature, dtype=dtype)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{bias_name}: expected the shape [{weight.shape[0]}], got {_shape(bias)}")
