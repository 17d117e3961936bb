"""The public functions: arguments, promises, and the operator that each one calls.

Shapes, dtypes and devices are checked by the operators (`operators/checks.py`), after autocast has cast what it
casts; the types of the arguments, which the dispatcher would report in its own words, are checked here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels import operators  # noqa: F401 - registers torch.ops.fpn_kernels
from fpn_kernels.backends import convolution, selection
from fpn_kernels.operators import checks


def _require_tensor(name: str, value: object, *, optional: bool = False) -> None:
    if isinstance(value, Tensor) or (optional and value is None):
        return
    wanted = "a tensor or None" if optional else "a tensor"
    raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")


def _require_options(mode: object, gain: object) -> None:
    if not isinstance(mode, str):
        raise TypeError(f"mode: expected a string, got {type(mode).__name__}")
    checks.check_mode(mode)
    if isinstance(gain, bool) or not isinstance(gain, (int, float)):
        raise TypeError(f"gain: expected a number, got {type(gain).__name__}")


def _require_memory_format(memory_format: object) -> None:
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format: expected a torch.memory_format, got {type(memory_format).__name__}")
    checks.check_memory_format(memory_format)


def upsample_add(top: Tensor, lateral: Tensor, *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    """Upsamples the coarser map to the size of the finer one and adds them, in one pass over memory.

    ``out = gain * (lateral + F.interpolate(top, size=(H, W), mode=mode))``, the merge of the top-down pathway
    (Feature Pyramid Networks, arXiv 1612.03144, figure 3).

    Args:
        top: the coarser map ``[N, C, h, w]``; h, w >= 1.  The ratio to ``H, W`` need not be 2, whole, or above 1.
        lateral: the finer map ``[N, C, H, W]``, same dtype and device; H, W >= 1.
        mode: ``"nearest"``, ``"nearest-exact"`` or ``"bilinear"`` (align_corners=False), as in
            `torch.nn.functional.interpolate`.  The nearest modes take eager PyTorch's float32 source index in every
            dtype and layout; contiguous CPU maps in eager do not at a few pairs of sizes in float64 and in
            ``"nearest-exact"`` (see `fpn_kernels.resampling`).
        gain: factor on the sum; 0.5 makes it an average.

    Returns:
        ``[N, C, H, W]``, dtype of `lateral`, dense; NHWC where `lateral`'s strides are NHWC, else NCHW.  Sums are
        carried in float32 (float64 for float64) and rounded once.

    Supports float16, bfloat16, float32 and float64, any strides, autograd (twice; the backward is the exact adjoint,
    deterministic), `torch.compile` and `torch.export`.  Under autocast it runs in the autocast dtype, where eager
    would upsample in float32.

    Moves ``(N C h w + 2 N C H W)`` elements.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device or `mode` does not fit; or a forced backend cannot serve the call.
    """
    _require_tensor("top", top)
    _require_tensor("lateral", lateral)
    _require_options(mode, gain)
    result: Tensor = torch.ops.fpn_kernels.upsample_add(top, lateral, mode=mode, gain=float(gain))
    return result


def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    top: Tensor | None = None,
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """The 1x1 lateral convolution, its bias and the merge with the coarser map as one operation.

    ``out = gain * (conv1x1(feature, weight) + bias + F.interpolate(top, size=(H, W), mode=mode))``; without `top`,
    the convolution alone and no gain (Feature Pyramid Networks, arXiv 1612.03144, figure 3).

    Args:
        feature: the backbone's map ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, 1, 1]`` or ``[Cout, Cin]``.
        bias: ``[Cout]``, or None.
        top: the coarser merged map ``[N, Cout, h, w]`` of any size, or None at the coarsest level.
        mode: as in `upsample_add`.
        gain: factor on the sum; not applied where there is no `top`.
        memory_format: layout of the result, at no extra pass: `torch.contiguous_format` (NCHW),
            `torch.channels_last` (NHWC) or `torch.preserve_format` (that of `feature`).

    Returns:
        ``[N, Cout, H, W]``, dtype of `feature`, dense.  Products are summed in float32 (float64 for float64);
        float32 on CUDA follows PyTorch's own precision switch for convolutions.

    All tensors share one dtype (float16, bfloat16, float32, float64) and one device.  Differentiable twice; only the
    gradients asked for are computed, deterministically.  Under autocast it runs in the autocast dtype.

    Takes ``2 N H W Cin Cout`` operations, and moves ``N H W (Cin + Cout) + N Cout h w`` elements and the weight where
    the fused kernel serves.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, `mode` or `memory_format` does not fit; or a forced backend cannot serve the
            call.
    """
    _require_tensor("feature", feature)
    _require_tensor("weight", weight)
    _require_tensor("bias", bias, optional=True)
    _require_tensor("top", top, optional=True)
    _require_options(mode, gain)
    _require_memory_format(memory_format)
    result: Tensor = torch.ops.fpn_kernels.lateral_connection(
        feature, weight, bias, top, mode=mode, gain=float(gain), memory_format=memory_format
    )
    return result


def output_conv(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """The 3x3 convolution (stride 1, padding 1) and its bias, which turn a merged map into an output map.

    ``out = F.conv2d(feature, weight, bias, padding=1)`` (Feature Pyramid Networks, arXiv 1612.03144, section 3).

    Args:
        feature: the merged map ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, 3, 3]``.
        bias: ``[Cout]``, or None.
        memory_format: layout of the result: `torch.contiguous_format` (NCHW), `torch.channels_last` (NHWC) or
            `torch.preserve_format` (that of `feature`).

    Returns:
        ``[N, Cout, H, W]``, dtype of `feature`, dense.  Products are summed in float32 (float64 for float64);
        float32 on CUDA follows PyTorch's own precision switch for convolutions.

    All tensors share one dtype (float16, bfloat16, float32, float64) and one device.  Differentiable twice; only the
    gradients asked for are computed.  Under autocast it runs in the autocast dtype.

    Takes ``18 N H W Cin Cout`` operations.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device or `memory_format` does not fit; or a forced backend cannot serve the call.
    """
    _require_tensor("feature", feature)
    _require_tensor("weight", weight)
    _require_tensor("bias", bias, optional=True)
    _require_memory_format(memory_format)
    result: Tensor = torch.ops.fpn_kernels.output_conv(feature, weight, bias, memory_format=memory_format)
    return result


def output_conv_format(feature: Tensor) -> torch.memory_format:
    """The layout of a merged map in which `output_conv` is fastest on this machine, whatever its result's layout.

    For the code that has the map made: `lateral_connection` writes either layout at no extra pass.

    Args:
        feature: a map of the same batch, size, device and dtype, such as the backbone's of the same level; under
            autocast the dtype is taken to be autocast's.

    Returns:
        `torch.contiguous_format`, `torch.channels_last`, or `torch.preserve_format` where it does not matter.
    """
    device_type, dtype = feature.device.type, feature.dtype
    if not convolution.is_large(feature):
        return torch.preserve_format
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    return _output_conv_format(device_type, dtype)


def _output_conv_format(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    return selection.fastest_format("output_conv", device_type, dtype)


# A constant to torch.compile, which cannot look into the selection of backends and need not: whatever is chosen later,
# the compiled network stays right.  The mark is that of `torch.compiler.assume_constant_result`, which would import the
# whole compiler, and Triton with it, to set it.
_output_conv_format._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reorder(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The map itself where it has the layout (NCHW or NHWC), else a copy in that layout.  Differentiable twice."""
    if source.is_contiguous(memory_format=memory_format):
        return source
    result: Tensor = torch.ops.fpn_kernels.reorder(source, memory_format=memory_format)
    return result


def _require_levels(name: str, values: object) -> None:
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(values).__name__}")


def _check_pathway(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> None:
    """Checks every level before the first is computed, with the level in the argument's name."""
    _require_levels("features", features)
    _require_levels("weights", weights)
    if len(features) == 0:
        raise ValueError("features: expected at least one map, got none")
    if len(weights) != len(features):
        raise ValueError(f"weights: expected one a level, {len(features)}, got {len(weights)}")
    if biases is not None:
        _require_levels("biases", biases)
        if len(biases) != len(features):
            raise ValueError(f"biases: expected one a level, {len(features)}, got {len(biases)}")
    for level, (feature, weight) in enumerate(zip(features, weights, strict=True)):
        bias = None if biases is None else biases[level]
        _require_tensor(f"features[{level}]", feature)
        _require_tensor(f"weights[{level}]", weight)
        _require_tensor(f"biases[{level}]", bias, optional=True)
        mixed = torch.is_autocast_enabled(feature.device.type)
        checks.check_pointwise(
            f"features[{level}]", feature, f"weights[{level}]", weight, f"biases[{level}]", bias, dtype=not mixed
        )
        checks.check_alike(f"features[{level}]", feature, "features[0]", features[0], dtype=not mixed)
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"features[{level}]: expected the batch of features[0], {features[0].shape[0]}, got {feature.shape[0]}"
            )
        if weight.shape[0] != weights[0].shape[0]:
            raise ValueError(
                f"weights[{level}]: expected the output channels of weights[0], {weights[0].shape[0]}, "
                f"got {weight.shape[0]}"
            )


def top_down_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Tensor, ...]:
    """Lateral connections from the coarsest level to the finest, each merged with the one above it.

    The same numbers as chained `lateral_connection` calls (Feature Pyramid Networks, arXiv 1612.03144, section 3).

    Args:
        features: the backbone's maps, finest first (C2..C5): ``[N, Cin_l, H_l, W_l]`` each, of any sizes.
        weights: one ``[Cout, Cin_l, 1, 1]`` or ``[Cout, Cin_l]`` a level.
        biases: one ``[Cout]`` or None a level; or None for no bias at all.
        mode: as in `upsample_add`.
        gain: factor on each merge; the coarsest level, which merges nothing, has none.
        memory_format: layout of every result, as in `lateral_connection`.

    Returns:
        The merged maps, finest first (M2..M5): ``[N, Cout, H_l, W_l]`` each.

    Raises:
        TypeError: an argument is of the wrong type or dtype (the message names the level).
        ValueError: a shape, a device, `mode` or `memory_format` does not fit.  All levels are checked before the
            first is computed.
    """
    _require_options(mode, gain)
    _require_memory_format(memory_format)
    _check_pathway(features, weights, biases)
    merged: list[Tensor] = []
    top: Tensor | None = None
    for level in reversed(range(len(features))):
        top = lateral_connection(
            features[level],
            weights[level],
            None if biases is None else biases[level],
            top,
            mode=mode,
            gain=gain,
            memory_format=memory_format,
        )
        merged.append(top)
    return tuple(reversed(merged))
