"""The public functions: arguments, promises, and the operator that each one calls.

The types of the arguments are checked here; the operators check shapes, dtypes and devices, after autocast has cast the
tensors.  A `__torch_function__` (of a proxy of `torch.fx`, a subclass, a mode) gets the call before any check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fpn_kernels.operators import checks, paths
from fpn_kernels.operators.lateral_connection import LATERAL_CONNECTION
from fpn_kernels.operators.output_conv import OUTPUT_CONV, OUTPUT_CONV_LEVELS
from fpn_kernels.operators.reorder import REORDER
from fpn_kernels.operators.top_down_pathway import TOP_DOWN_PATHWAY
from fpn_kernels.operators.upsample_add import UPSAMPLE_ADD
from fpn_kernels.operators.weighted_merge import WEIGHTED_MERGE

# The public names of the package; the rest is for its modules.
__all__ = ["lateral_connection", "output_conv", "top_down_pathway", "upsample_add", "weighted_merge"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _overridden(function: Callable[_P, _R], tensors: Iterable[Any], *arguments: _P.args, **options: _P.kwargs) -> _R:
    """The call as the `__torch_function__` of one of its tensors, or of a mode, makes it."""
    # In torch's stubs its signature has no room for the arguments that it passes on.
    handle: Any = torch.overrides.handle_torch_function
    result: _R = handle(function, tensors, *arguments, **options)
    return result


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


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
    """Upsample the coarser map to the size of the finer one and add them, in one pass over memory.

    ``out = gain * (lateral + F.interpolate(top, size=(H, W), mode=mode))``, the merge of the top-down pathway.

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

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device or `mode` does not fit; or a forced backend cannot serve the call.

    Dtypes and layout:
        float16, bfloat16, float32 and float64; NCHW, NHWC or any other strides.  Differentiable twice: the backward is
        the exact adjoint, deterministic.  Serves `torch.compile` and `torch.export`.  Under autocast it runs in the
        autocast dtype, where eager would upsample in float32.

    Cost:
        ``(2 N C H W + N C h w) itemsize`` bytes, one addition per element.

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, figure 3; the resize is `torch.nn.functional.interpolate`'s.
    """
    if has_torch_function((top, lateral)):
        return _overridden(upsample_add, (top, lateral), top, lateral, mode=mode, gain=gain)
    _require_tensor("top", top)
    _require_tensor("lateral", lateral)
    _require_options(mode, gain)
    result: Tensor = UPSAMPLE_ADD(top, lateral, mode=mode, gain=float(gain))
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
    the convolution alone and no gain.

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

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, `mode` or `memory_format` does not fit; or a forced backend cannot serve the
            call.

    Dtypes and layout:
        All tensors share one dtype (float16, bfloat16, float32, float64) and one device; NCHW, NHWC or any other
        strides.  Differentiable twice; only required gradients are computed, deterministically.  Serves
        `torch.compile` and `torch.export`.  Under autocast it runs in the autocast dtype.

    Cost:
        ``(N H W (Cin + Cout) + Cin Cout + Cout + N Cout h w) itemsize`` bytes where the fused kernel serves (`explain`
        tells), and ``2 N H W Cin Cout`` operations.

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, figure 3; `torch.nn.functional.conv2d` and
        `torch.nn.functional.interpolate`.
    """
    if has_torch_function((feature, weight, bias, top)):
        return _overridden(
            lateral_connection,
            (feature, weight, bias, top),
            *(feature, weight, bias, top),
            mode=mode,
            gain=gain,
            memory_format=memory_format,
        )
    _require_tensor("feature", feature)
    _require_tensor("weight", weight)
    _require_tensor("bias", bias, optional=True)
    _require_tensor("top", top, optional=True)
    _require_options(mode, gain)
    _require_memory_format(memory_format)
    result: Tensor = LATERAL_CONNECTION(
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
    """The 3x3 convolution (stride 1, padding 1) with its bias, from a merged map to an output map.

    ``out = F.conv2d(feature, weight, bias, padding=1)``.

    Args:
        feature: the merged map ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, 3, 3]``.
        bias: ``[Cout]``, or None.
        memory_format: layout of the result: `torch.contiguous_format` (NCHW), `torch.channels_last` (NHWC) or
            `torch.preserve_format` (that of `feature`).

    Returns:
        ``[N, Cout, H, W]``, dtype of `feature`, dense.  Products are summed in float32 (float64 for float64);
        float32 on CUDA follows PyTorch's own precision switch for convolutions.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device or `memory_format` does not fit; or a forced backend cannot serve the call.

    Dtypes and layout:
        All tensors share one dtype (float16, bfloat16, float32, float64) and one device; NCHW, NHWC or any other
        strides.  Differentiable twice; only required gradients are computed.  Serves `torch.compile` and
        `torch.export`.  Under autocast it runs in the autocast dtype.

    Cost:
        At least ``(N H W (Cin + Cout) + 9 Cin Cout + Cout) itemsize`` bytes, and ``18 N H W Cin Cout`` operations
        by the formula above (Winograd kernels need fewer).

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, section 3; `torch.nn.functional.conv2d`.
    """
    if has_torch_function((feature, weight, bias)):
        tensors = (feature, weight, bias)
        return _overridden(output_conv, tensors, feature, weight, bias, memory_format=memory_format)
    _require_tensor("feature", feature)
    _require_tensor("weight", weight)
    _require_tensor("bias", bias, optional=True)
    _require_memory_format(memory_format)
    result: Tensor = OUTPUT_CONV(feature, weight, bias, memory_format=memory_format)
    return result


def output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Tensor, ...]:
    """`output_conv` of every level of a pyramid, each with its own weight and bias; some levels may share a launch.

    Autograd records one node per level, which frees the maps of that level after its backward.  Inside `torch.compile`
    all levels are one operator.

    Args:
        features: the merged maps ``[N_l, Cin_l, H_l, W_l]`` of one dtype and device.
        weights: one ``[Cout_l, Cin_l, 3, 3]`` per level.
        biases: one ``[Cout_l]`` or None per level; or None for no bias at all.
        memory_format: layout of every result, as in `output_conv`.

    Returns:
        One ``[N_l, Cout_l, H_l, W_l]`` per level: the numbers of `output_conv`, up to the order of sums where levels
        share a launch.

    Raises:
        TypeError: an argument is of the wrong type or dtype (the message names the level).
        ValueError: a shape, a device or `memory_format` does not fit; or a forced backend cannot serve a level.
    """
    tensors = (*_listed(features), *_listed(weights), *_listed(biases))
    if has_torch_function(tensors):
        return _overridden(output_conv_levels, tensors, features, weights, biases, memory_format=memory_format)
    _require_memory_format(memory_format)
    _require_levels("features", features)
    _require_levels("weights", weights)
    given, levels = _present(biases, len(features))
    path = paths.path_of(*features, *weights, *given)
    # The dispatcher would record one node for all levels.
    if path == paths.DISPATCHED and len(features) == len(weights) and _is_recorded(*features, *weights, *given):
        placed = [None] * len(features) if biases is None else biases
        each = zip(features, weights, placed, strict=True)
        return tuple(output_conv(*level, memory_format=memory_format) for level in each)
    run = OUTPUT_CONV_LEVELS.on(path)
    results: list[Tensor] = run(list(features), list(weights), given, levels, memory_format=memory_format)
    return tuple(results)


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd will save tensors for a backward; a compiler frees them in time."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in tensors)


def reorder(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The map itself if it has the layout (NCHW or NHWC), else a copy in that layout.  Differentiable twice."""
    if paths.is_watched() or source.is_contiguous(memory_format=memory_format):
        return source  # vmap hides the layout
    result: Tensor = REORDER(source, memory_format=memory_format)
    return result


def _require_levels(name: str, values: object, *, optional: bool = False) -> None:
    if type(values) not in (list, tuple) and (isinstance(values, Tensor) or not isinstance(values, Sequence)):
        raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(values).__name__}")
    levels: Sequence[object] = values  # type: ignore[assignment]
    # One check for all levels saves 2 us for three lists of four (one core of Zen 3).
    if paths.PLAIN_TENSORS.issuperset(map(type, levels)):
        return
    for level, value in enumerate(levels):
        _require_tensor(f"{name}[{level}]", value, optional=optional)


def _present(biases: Sequence[Tensor | None] | None, count: int) -> tuple[list[Tensor], list[int]]:
    """The biases that are not None, and their levels."""
    if biases is None:
        return [], []
    _require_levels("biases", biases, optional=True)
    if len(biases) != count:
        raise ValueError(f"biases: expected {count} (one per level), got {len(biases)}")
    present = [(level, bias) for level, bias in enumerate(biases) if bias is not None]
    return [bias for _, bias in present], [level for level, _ in present]


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

    The same numbers as chained `lateral_connection` calls, with one gradient formula for all of them.

    Args:
        features: the backbone's maps, finest first (C2..C5): ``[N, Cin_l, H_l, W_l]`` each, of any sizes.
        weights: one ``[Cout, Cin_l, 1, 1]`` or ``[Cout, Cin_l]`` per level.
        biases: one ``[Cout]`` or None per level; or None for no bias at all.
        mode: as in `upsample_add`.
        gain: factor on each merge; not applied to the coarsest level, which has no merge.
        memory_format: layout of every result, as in `lateral_connection`.

    Returns:
        The merged maps, finest first (M2..M5): ``[N, Cout, H_l, W_l]`` each, of the dtype of the features.

    Raises:
        TypeError: an argument is of the wrong type or dtype (the message names the level).
        ValueError: a shape, a device, `mode` or `memory_format` does not fit; or a forced backend cannot serve a
            level.  All levels are checked before the first is computed.

    Dtypes and layout:
        As in `lateral_connection`: float16, bfloat16, float32 and float64; NCHW, NHWC or any other strides, which may
        differ between levels.  Differentiable twice; the gradient from the finer levels is accumulated into a level's
        upstream gradient in the pass that computes it.

    Cost:
        At least ``sum_l (N H_l W_l (Cin_l + Cout) + Cin_l Cout + Cout) itemsize`` bytes; a merged map that has left the
        cache before the finer level reads it costs ``N Cout H_l W_l`` more elements.

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, section 3.
    """
    tensors = (*_listed(features), *_listed(weights), *_listed(biases))
    if has_torch_function(tensors):
        return _overridden(
            top_down_pathway, tensors, features, weights, biases, mode=mode, gain=gain, memory_format=memory_format
        )
    _require_options(mode, gain)
    _require_memory_format(memory_format)
    _require_levels("features", features)
    _require_levels("weights", weights)
    given, levels = _present(biases, len(features))
    path = paths.path_of(*features, *weights, *given)
    merged: list[Tensor] = TOP_DOWN_PATHWAY.on(path)(
        list(features), list(weights), given, levels, mode=mode, gain=float(gain), memory_format=memory_format
    )
    return tuple(merged)


def weighted_merge(
    inputs: Sequence[Tensor],
    weights: Tensor,
    *,
    normalization: str = "relu",
    eps: float = 1e-4,
    mode: str = "nearest",
) -> Tensor:
    """The weighted sum of two or three maps with learned, normalised weights, in one pass over memory.

    ``out = sum_i w_i * resize(inputs[i])``, the weighted feature fusion of BiFPN, where a top-down node merges its
    input with a coarser map, and a bottom-up node three of one size.

    Args:
        inputs: two or three maps ``[N, C, h_i, w_i]`` of one dtype and device; h_i, w_i >= 1.  The first one
            gives the size ``[H, W]``, the dtype and the layout of the result; maps of another size are resized on the
            fly.
        weights: the weights before normalisation, ``[len(inputs)]``, of any floating-point dtype, on the maps' device.
            The host never reads them, and autocast does not cast them.
        normalization: ``"relu"``, the paper's fast normalized fusion, ``w_i = relu(weights_i) / (eps + sum_j
            relu(weights_j))``; or ``"softmax"``, its softmax-based fusion.
        eps: as above, at least 0; not used by ``"softmax"``.  Where no weight is positive the result is 0 (and NaN
            with an eps of 0).
        mode: how maps are resized, as in `upsample_add`.

    Returns:
        ``[N, C, H, W]``, dense; NHWC where the first map's strides are NHWC, else NCHW.  Weights are normalised, and
        products summed, in float32 (float64 for float64 maps); the sum is rounded once.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the number of maps, a shape, a device, `normalization`, `eps` or `mode` does not fit; or a forced
            backend cannot serve the call.

    Dtypes and layout:
        float16, bfloat16, float32 and float64; NCHW, NHWC or any other strides.  Differentiable twice, the weights
        included, deterministically.  Serves `torch.compile` and `torch.export`.  Under autocast the maps are cast to
        the autocast dtype.

    Cost:
        ``(sum_i N C h_i w_i + N C H W) itemsize`` bytes, and a few for the weights.

    Source:
        EfficientDet, arXiv 1911.09070, section 3.3.
    """
    tensors = (*_listed(inputs), weights)
    if has_torch_function(tensors):
        return _overridden(weighted_merge, tensors, inputs, weights, normalization=normalization, eps=eps, mode=mode)
    _require_levels("inputs", inputs)
    if len(inputs) not in (2, 3):
        raise ValueError(f"inputs: expected two or three maps, got {len(inputs)}")
    for index, tensor in enumerate(inputs):
        _require_tensor(f"inputs[{index}]", tensor)
    _require_tensor("weights", weights)
    checks.check_normalization(normalization, eps)
    _require_options(mode, 1.0)
    third = inputs[2] if len(inputs) == 3 else None
    result: Tensor = WEIGHTED_MERGE(
        inputs[0], inputs[1], third, weights, mode=mode, normalization=normalization, eps=float(eps)
    )
    return result
