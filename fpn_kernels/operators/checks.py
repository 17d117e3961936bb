"""What an operator accepts, checked before anything is launched, on every backend and while tracing.

Each message names the argument, what was wanted and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.resampling import MODES

NORMALIZATIONS = ("relu", "softmax")
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


def check_output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    memory_format: torch.memory_format | None,
) -> None:
    """Every level before the first is computed, with the level in the argument's name."""
    check_memory_format(memory_format)
    _check_levels(features, weights, biases)
    for level, (feature, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
        name = f"features[{level}]"
        check_pointwise(name, feature, f"weights[{level}]", weight, f"biases[{level}]", bias, kernel_size=3)
        check_alike(name, feature, "features[0]", features[0])


def check_output_conv_backward_weight(grad: Tensor, feature: Tensor, memory_format: torch.memory_format | None) -> None:
    check_memory_format(memory_format)
    check_map("grad", grad)
    check_map("feature", feature)
    check_alike("feature", feature, "grad", grad)
    for name, tensor in (("grad", grad), ("feature", feature)):
        if tensor.shape[1] < 1:
            raise ValueError(f"{name}: expected at least one channel, got the shape {_shape(tensor)}")
    if feature.shape[0] != grad.shape[0] or feature.shape[2:] != grad.shape[2:]:
        n, _, height, width = grad.shape
        raise ValueError(
            f"feature: expected the batch and size of grad, [{n}, Cin, {height}, {width}], got {_shape(feature)}"
        )


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


def check_adjoint(grad: Tensor, top_size: Sequence[int], mode: str, own: Tensor | None = None) -> None:
    check_mode(mode)
    check_map("grad", grad)
    if len(top_size) != 2 or top_size[0] < 1 or top_size[1] < 1:
        raise ValueError(f"top_size: expected two sizes of at least 1, got {list(top_size)}")
    if own is None:
        return
    check_map("own", own)
    check_alike("own", own, "grad", grad)
    wanted = [*grad.shape[:2], *top_size]
    if list(own.shape) != wanted:
        raise ValueError(f"own: expected the shape {wanted}, got {_shape(own)}")


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over a map are carried in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_normalization(normalization: object, eps: object, known: Sequence[str] = NORMALIZATIONS) -> None:
    """How weights are made to add up to one, or nearly so."""
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
        raise ValueError(f"{name}: expected the shape [{count}], one number a map, got {_shape(weights)}")


def check_weighted_merge(
    inputs: Sequence[Tensor], weights: Tensor, mode: str, normalization: str = "none", eps: float = 0.0
) -> None:
    check_mode(mode)
    check_normalization(normalization, eps, (*NORMALIZATIONS, "none"))
    first = inputs[0]
    check_map("inputs[0]", first)
    for index, tensor in enumerate(inputs[1:], start=1):
        name = f"inputs[{index}]"
        check_map(name, tensor)
        check_alike(name, tensor, "inputs[0]", first)
        if tensor.shape[0] != first.shape[0] or tensor.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: expected the batch and channels of inputs[0], [{first.shape[0]}, {first.shape[1]}, h, w], "
                f"got {_shape(tensor)}"
            )
    check_weights("weights", weights, len(inputs))
    if normalization == "none":
        _check_sum_dtype("weights", weights, first)
    else:
        _check_device("weights", weights, first)


def _check_sum_dtype(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != sum_dtype(like):
        raise TypeError(
            f"{name}: expected {sum_dtype(like)}, in which maps of {like.dtype} are summed, got {tensor.dtype}"
        )
    _check_device(name, tensor, like)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected the device of the maps, {like.device}, got {tensor.device}")


def check_weighted_merge_backward(grad: Tensor, input: Tensor, factor: Tensor) -> None:
    check_map("grad", grad)
    check_map("input", input)
    check_alike("input", input, "grad", grad)
    if input.shape != grad.shape:
        raise ValueError(f"input: expected the shape of grad, {_shape(grad)}, got {_shape(input)}")
    if factor.dim() != 0:
        raise ValueError(f"factor: expected a single number (no dimensions), got the shape {_shape(factor)}")
    _check_sum_dtype("factor", factor, grad)


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


def _check_levels(features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """At least one level, and one of each."""
    if len(features) == 0:
        raise ValueError("features: expected at least one map, got none")
    for name, values in (("weights", weights), ("biases", biases)):
        if len(values) != len(features):
            raise ValueError(f"{name}: expected one a level, {len(features)}, got {len(values)}")


def check_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mode: str,
    memory_format: torch.memory_format | None,
) -> None:
    """Every level before the first is computed, with the level in the argument's name."""
    check_mode(mode)
    check_memory_format(memory_format)
    _check_levels(features, weights, biases)
    for level, (feature, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
        name = f"features[{level}]"
        check_pointwise(name, feature, f"weights[{level}]", weight, f"biases[{level}]", bias)
        check_alike(name, feature, "features[0]", features[0])
        batch, channels = features[0].shape[0], weights[0].shape[0]
        if feature.shape[0] != batch:
            raise ValueError(f"{name}: expected the batch of features[0], {batch}, got {feature.shape[0]}")
        if weight.shape[0] != channels:
            raise ValueError(
                f"weights[{level}]: expected the output channels of weights[0], {channels}, got {weight.shape[0]}"
            )
