"""The gradients of the 3x3 convolution, and which autograd records it.  Every part is differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import aten, dispatch, plan_cache
from fpn_kernels.operators.channel_sums import CHANNEL_SUMS
from fpn_kernels.operators.layouts import result_format
from fpn_kernels.operators.output_conv import eager
from fpn_kernels.operators.output_conv.call import OutputConv, OutputConvBackwardWeight, OutputConvLevels
from fpn_kernels.operators.paths import path_of
from fpn_kernels.operators.reorder import REORDER
from fpn_kernels.operators.sums import sum_per_channel

# From this size on, a faster kernel is worth an autograd node of ours, which is Python.  On an H100 (256 channels,
# bfloat16) Triton's kernel takes 47 us less than cuDNN's with its bias at 64,000 pixels and 10 us less at 16,000, and a
# node costs the host 40 to 110 us more than PyTorch's.  The neck of one image, forward and backward, took 967 us on the
# device with PyTorch's nodes alone, and 915 us with ours alone.
_MIN_NODE_PIXELS = 1 << 15

# Layouts of a map and of a weight.
Formats = tuple[torch.memory_format, torch.memory_format]


def save(ctx: Any, call: OutputConv, result: Tensor) -> None:
    feature, weight = call.feature, call.weight
    wants_feature, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(feature if wants_weight else None, weight if wants_feature else None)
    ctx.formats = result_format(feature), result_format(weight)


def _adjoint(path: str, grad: Tensor, weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The adjoint of the convolution: the convolution with the weight rotated by 180 degrees and transposed."""
    from fpn_kernels.operators.output_conv import OUTPUT_CONV

    result: Tensor = OUTPUT_CONV.on(path)(grad, weight.flip(2, 3).transpose(0, 1), None, memory_format=memory_format)
    return result


def gradients(
    grad: Tensor, feature: Tensor | None, weight: Tensor | None, wants: Sequence[bool], formats: Formats
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the feature, the weight and the bias, of which some are wanted.

    Args:
        grad: the gradient of the convolution's result.
        feature: None where the weight's gradient is not wanted.
        weight: None where the feature's is not wanted.
        wants: which of the three are wanted.
        formats: the layouts of the feature and of the weight, for their gradients.
    """
    from fpn_kernels.operators.output_conv import OUTPUT_CONV_BACKWARD_WEIGHT

    wants_feature, wants_weight, wants_bias = wants
    feature_format, weight_format = formats
    path = path_of(grad, feature, weight)
    grad_feature = grad_weight = grad_bias = None
    if wants_weight and grad.device.type == "cpu" and result_format(grad) != feature_format:
        # One fast copy for both products: ATen's gradient of the weight from maps of two layouts took 1.1 to 1.2 times
        # as long as from maps of one (Zen 4, 256 channels, bfloat16 and float32).
        grad = REORDER.on(path)(grad, memory_format=feature_format)
    by_tiles = native.multiplies_by_tiles(grad.dtype)
    by_adjoint = wants_feature and (not wants_weight or aten.adjoint_is_faster(grad, by_tiles))
    if by_adjoint:
        assert weight is not None
        grad_feature = _adjoint(path, grad, weight, feature_format)
    if not wants_weight:
        grad_bias = sum_per_channel(grad, 1.0) if wants_bias else None
        return grad_feature, None, grad_bias
    assert feature is not None
    if wants_feature and not by_adjoint:
        # cuDNN has no gradient of a bias: ATen would sum it in a launch of its own, and a slow one.
        apart = wants_bias and grad.device.type == "cuda"
        grad_feature, grad_weight, grad_bias = aten.gradients(grad, feature, weight, wants_bias and not apart)
        return grad_feature, grad_weight, CHANNEL_SUMS.on(path)(grad) if apart else grad_bias
    grad_weight, grad_bias = OUTPUT_CONV_BACKWARD_WEIGHT.on(path)(
        grad, feature, wants_bias=wants_bias, memory_format=weight_format
    )
    return grad_feature, grad_weight, grad_bias if wants_bias else None


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    feature, weight = ctx.saved_tensors
    return gradients(grad, feature, weight, ctx.wants[:3], ctx.formats)


def by_aten(call: OutputConv) -> Tensor | None:
    """The convolution under PyTorch's own autograd, or None where a node of ours is better.

    A node of ours is Python: forward and backward of a map of a few pixels took 161 us, and 98 us with PyTorch's node
    (one core of Zen 4).
    """
    from fpn_kernels.operators.output_conv import OUTPUT_CONV

    return planned_by_aten(OUTPUT_CONV.plan(call), call) if may_be_atens(call) else None


def may_be_atens(call: OutputConv) -> bool:
    """Whether both gradients are wanted and are ATen's in any case: PyTorch's node then saves nothing in vain."""
    wanted = call.feature.requires_grad and call.weight.requires_grad
    return wanted and aten.gradients_are_atens(call.feature.device.type)


def planned_by_aten(plan: plan_cache.Plan, call: OutputConv) -> Tensor | None:
    """As `by_aten`, for a call that has a plan and that `may_be_atens`."""
    if plan.backend is None or not _aten_records(call, plan.backend):
        return None
    dispatch.record("output_conv", "eager")
    return eager.output_conv(call)


def _aten_records(call: OutputConv, backend: str) -> bool:
    large = any(dispatch.forced_by()) or aten.is_large(call.feature, _MIN_NODE_PIXELS)
    return backend == "eager" or not large


def recorded_by(call: OutputConv, backend: str) -> str:
    """Which autograd records a call, for `explain`."""
    if may_be_atens(call) and _aten_records(call, backend):
        return "PyTorch's own node, and its own convolution" + ("" if backend == "eager" else ": the map is small")
    return "one node of this library"


def save_levels(ctx: Any, call: OutputConvLevels, result: list[Tensor]) -> None:
    features, weights = call.features, call.weights
    wants_features, wants_weights = ctx.needs_input_grad[: len(features)], ctx.needs_input_grad[len(features) :]
    ctx.save_for_backward(
        *(feature if wants else None for feature, wants in zip(features, wants_weights, strict=False)),
        *(weight if wants else None for weight, wants in zip(weights, wants_features, strict=True)),
    )
    ctx.formats = [
        (result_format(feature), result_format(weight)) for feature, weight in zip(features, weights, strict=True)
    ]
    ctx.bias_levels = list(call.bias_levels)
    # A level whose map is not used has no upstream gradient: None, not a map of zeros.
    ctx.set_materialize_grads(False)


def backward_levels(
    ctx: Any, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[None] | None]:
    count = len(ctx.formats)
    wants_features, wants_weights, wants_some_biases, _ = ctx.wants
    wants_biases = dict(zip(ctx.bias_levels, wants_some_biases, strict=True))
    # Read once: activation checkpointing recomputes what was saved, for one reading.
    saved = ctx.saved_tensors
    features, weights = saved[:count], saved[count:]
    of_features: list[Tensor | None] = [None] * count
    of_weights: list[Tensor | None] = [None] * count
    of_biases: list[Tensor | None] = [None] * count
    for level, grad in enumerate(grads):
        wants = (wants_features[level], wants_weights[level], wants_biases.get(level, False))
        if grad is not None:
            of_features[level], of_weights[level], of_biases[level] = gradients(
                grad, features[level], weights[level], wants, ctx.formats[level]
            )
    # An empty list counts as a list of tensors, and its gradient is an empty list.
    of_bias_levels: list[None] | None = None if ctx.bias_levels else []
    return of_features, of_weights, [of_biases[level] for level in ctx.bias_levels], of_bias_levels


def save_backward_weight(ctx: Any, call: OutputConvBackwardWeight, result: Any) -> None:
    grad, feature = call.grad, call.feature
    wants_grad, wants_feature = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if wants_feature else None, feature if wants_grad else None)
    ctx.wants_bias = call.wants_bias
    ctx.formats = result_format(grad), result_format(feature)


def double_backward_weight(
    ctx: Any, grad_of_weight: Tensor, grad_of_bias: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    from fpn_kernels.operators.output_conv import OUTPUT_CONV

    grad, feature = ctx.saved_tensors
    grad_of_grad = grad_of_feature = None
    if feature is not None:
        # The results are linear in grad: its gradient is the convolution itself.
        bias = grad_of_bias if ctx.wants_bias else None
        grad_of_grad = OUTPUT_CONV(feature, grad_of_weight, bias, memory_format=ctx.formats[0])
    if grad is not None:
        # They are linear in feature, too: its gradient is the adjoint of the convolution.
        path = path_of(grad, grad_of_weight)
        grad_of_feature = _adjoint(path, grad, grad_of_weight, ctx.formats[1])
    return grad_of_grad, grad_of_feature
