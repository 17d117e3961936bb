"""`fpn_kernels::output_conv`: the 3x3 convolution (stride 1, padding 1) of a merged map, and its bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import convolution, eager, native, selection, serving
from fpn_kernels.backends.eager import sum_per_channel
from fpn_kernels.backends.layouts import allocate, requested_format, result_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import check_output_conv

_MANY_PIXELS = 1 << 15

# Layouts of a map and of a weight.
Formats = tuple[torch.memory_format, torch.memory_format]


def _allocate(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> Tensor:
    shape = (feature.shape[0], weight.shape[0], *feature.shape[2:])
    return allocate(shape, feature, requested_format(feature, memory_format))


def prepare(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> serving.Prepared:
    """What computes the operator."""
    arguments = (feature, weight, bias, memory_format)
    return serving.prepare("output_conv", *arguments, check=check_output_conv, empty=_allocate)


def _kernel(
    feature: Tensor, weight: Tensor, bias: Tensor | None, *, memory_format: torch.memory_format | None = None
) -> Tensor:
    arguments = (feature, weight, bias, memory_format)
    result: Tensor = prepare(*arguments)(*arguments)
    return result


def _fake(
    feature: Tensor, weight: Tensor, bias: Tensor | None, *, memory_format: torch.memory_format | None = None
) -> Tensor:
    check_output_conv(feature, weight, bias, memory_format)
    return _allocate(feature, weight, bias, memory_format)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    feature, weight, _ = inputs
    wants_feature, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(feature if wants_weight else None, weight if wants_feature else None)
    ctx.formats = result_format(feature), result_format(weight)


def gradients(
    grad: Tensor, feature: Tensor | None, weight: Tensor | None, wants: Sequence[bool], formats: Formats
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the convolution owes to its feature, its weight and its bias, of which some are wanted.  Differentiable.

    Args:
        grad: the gradient of its result.
        feature: None where the weight's gradient is not wanted.
        weight: None where the feature's is not.
        wants: which of the three are wanted.
        formats: the layouts of the feature and of the weight, for their gradients.
    """
    wants_feature, wants_weight, wants_bias = wants
    feature_format, weight_format = formats
    grad_feature = grad_weight = grad_bias = None
    if wants_weight and grad.device.type == "cpu" and result_format(grad) != feature_format:
        # One fast copy for both products: ATen's gradient of the weight from maps of two layouts took 1.1 to 1.2 times
        # as long as from maps of one (Zen 4, 256 channels, bfloat16 and float32).
        grad = direct.operators(grad).reorder(grad, memory_format=feature_format)
    by_tiles = native.multiplies_by_tiles(grad.dtype)
    by_adjoint = wants_feature and (not wants_weight or convolution.adjoint_is_faster(grad, by_tiles))
    if by_adjoint:
        assert weight is not None
        # The adjoint of a 3x3 convolution with padding 1 is the one with the weight turned about and transposed.
        adjoint = weight.flip(2, 3).transpose(0, 1)
        convolve = direct.operators(grad, adjoint).output_conv
        grad_feature = convolve(grad, adjoint, None, memory_format=feature_format)
    if not wants_weight:
        grad_bias = sum_per_channel(grad, 1.0) if wants_bias else None
        return grad_feature, None, grad_bias
    assert feature is not None
    if wants_feature and not by_adjoint:
        # cuDNN has no gradient of a bias: ATen would add it up in a launch of its own, and a slow one.
        apart = wants_bias and grad.device.type == "cuda"
        grad_feature, grad_weight, grad_bias = convolution.gradients(grad, feature, weight, wants_bias and not apart)
        return grad_feature, grad_weight, direct.operators(grad).channel_sums(grad) if apart else grad_bias
    of_weight = direct.operators(grad, feature).output_conv_backward_weight
    grad_weight, grad_bias = of_weight(grad, feature, wants_bias=wants_bias, memory_format=weight_format)
    return grad_feature, grad_weight, grad_bias if wants_bias else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    feature, weight = ctx.saved_tensors
    return gradients(grad, feature, weight, ctx.wants[:3], ctx.formats)


def _recorded(
    feature: Tensor, weight: Tensor, bias: Tensor | None, *, memory_format: torch.memory_format | None = None
) -> Tensor | None:
    """PyTorch's own convolution under its own autograd, where that computes the gradients as well.

    A node of ours is Python: forward and backward of a map of a few pixels took 161 us, and 98 so (one core of Zen 4).
    It keeps less where one of the two gradients alone is wanted, for which PyTorch's keeps feature and weight.

    Where another backend would serve, it is eager all the same on maps of which the device would save less than the
    host loses.
    """
    if not may_be_atens(feature, weight):
        return None
    return recorded_by_aten(prepare(feature, weight, bias, memory_format), feature, weight, bias, memory_format)


def may_be_atens(feature: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own node would keep nothing in vain, and compute gradients that are ATen's anyway."""
    return feature.requires_grad and weight.requires_grad and convolution.gradients_are_atens(feature.device.type)


def recorded_by_aten(
    prepared: serving.Prepared,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    memory_format: torch.memory_format | None,
) -> Tensor | None:
    """As `_recorded`, of a call that has been prepared and that `may_be_atens`."""
    if prepared.backend is None:
        return None
    if prepared.backend != eager.BACKEND.name and _node_pays(feature):
        return None
    selection.record("output_conv", eager.BACKEND.name)
    return eager.output_conv(feature, weight, bias, memory_format)


def _node_pays(feature: Tensor) -> bool:
    """Whether a map is so large that a faster kernel is worth a node of ours, or a backend was forced.

    On an H100 (256 channels, bfloat16) Triton's kernel takes 47 us less than cuDNN's with its bias at 64,000 pixels and
    10 us less at 16,000, and a node costs the host 40 to 110 us more than PyTorch's.  The neck of one image, forward
    and backward, took 967 us on the device with PyTorch's nodes alone, and 915 with ours alone.
    """
    return any(selection.forced_by()) or convolution.is_large(feature, _MANY_PIXELS)


_NAME = registration.define(
    # No default before the star: see lateral_connection.py.
    "output_conv(Tensor feature, Tensor weight, Tensor? bias, *, MemoryFormat? memory_format=None) -> Tensor",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context, _recorded)
registration.autocast(_NAME)
