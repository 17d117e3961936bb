"""The gradients of `lateral_connection`, by parts that `top_down_pathway` shares.  Every part is differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.operators import aten
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.layouts import result_format
from fpn_kernels.operators.paths import path_of
from fpn_kernels.operators.reorder import REORDER
from fpn_kernels.operators.sums import sum_per_channel
from fpn_kernels.operators.upsample_add import MERGE_BACKWARD, UPSAMPLE_ADD_BACKWARD


def save(ctx: Any, call: LateralConnection, result: Tensor) -> None:
    feature, weight, top = call.feature, call.weight, call.top
    wants_feature, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(feature if wants_weight else None, weight if wants_feature else None)
    ctx.feature_format = result_format(feature)
    ctx.top_size = None if top is None else top.shape[2:]
    ctx.mode, ctx.gain = call.mode, 1.0 if top is None else call.gain
    ctx.weight_shape = weight.shape


def _rows(tensor: Tensor) -> Tensor | None:
    """The map as a matrix [channels, pixels], where that is a view of it."""
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).flatten(0, 2).t()
    return tensor[0].flatten(1) if tensor.shape[0] == 1 and tensor.is_contiguous() else None


def weight_gradient(
    grad: Tensor, feature: Tensor, shape: Sequence[int], gain: float, wants_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """``gain * sum over pixels of grad x feature``, in the weight's shape, and the bias's gradient if wanted."""
    dtype = aten.arithmetic_dtype(grad.device.type, grad.dtype)
    # On the CPU one matrix product in bfloat16 is 1.5 to 2.3 times as fast as ATen's convolution backward (256 to 1024
    # channels, C2 to C4 of an 800 x 1280 image, 2 cores with AVX512-BF16), and 1.0 to 2.3 times through float32 on two
    # cores of Zen 3.  float32 itself gains as much there, but its error is up to 1.6 times the convolution's.
    if grad.device.type == "cpu" and (grad.dtype == torch.bfloat16 or dtype != grad.dtype):
        outputs, inputs = _rows(grad), _rows(feature)
        if outputs is not None and inputs is not None:
            product = outputs.to(dtype) @ inputs.to(dtype).t()
            bias = sum_per_channel(grad, gain) if wants_bias else None
            return (product if gain == 1.0 else product * gain).to(grad.dtype).reshape(shape), bias
    if dtype != grad.dtype:
        of_weight, of_bias = weight_gradient(grad.to(dtype), feature.to(dtype), shape, gain, wants_bias)
        return of_weight.to(grad.dtype), None if of_bias is None else of_bias.to(grad.dtype)
    # A factor would round ATen's bias twice.
    by_aten = wants_bias and gain == 1.0
    # The weight's own gradient does not depend on its values; only the shape is read.  Not zeros: filling them is a
    # launch of 37 us on the host of an H100.  Not one number expanded: oneDNN would copy it to every element (3.1 and
    # 2.9 ms at C5 of 800 x 1280 on two cores of Zen 3).
    weight = feature.new_empty((grad.shape[1], feature.shape[1], 1, 1))
    _, of_weight, of_bias = torch.ops.aten.convolution_backward.default(
        *(grad, feature, weight, [grad.shape[1]] if by_aten else None),
        *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, by_aten]),
    )
    if wants_bias and not by_aten:
        of_bias = sum_per_channel(grad, gain)
    of_weight = of_weight if gain == 1.0 else of_weight * gain
    return of_weight if of_weight.shape == shape else of_weight.reshape(shape), of_bias


def feature_gradient(
    path: str, grad: Tensor, weight: Tensor, gain: float, memory_format: torch.memory_format
) -> Tensor:
    """The adjoint of a 1x1 convolution: the 1x1 convolution with the transposed weight."""
    from fpn_kernels.operators.lateral_connection import LATERAL_CONNECTION

    adjoint = weight.flatten(1).t()
    adjoint = adjoint if gain == 1.0 else adjoint * gain
    result: Tensor = LATERAL_CONNECTION.on(path)(grad, adjoint, None, None, memory_format=memory_format)
    return result


def aligned(path: str, grad: Tensor, feature_format: torch.memory_format) -> Tensor:
    """The gradient in the layout in which the two products with it are fastest."""
    if not _pays_to_align(grad, feature_format):
        return grad
    result: Tensor = REORDER.on(path)(grad, memory_format=feature_format)
    return result


def _pays_to_align(grad: Tensor, feature_format: torch.memory_format) -> bool:
    """Whether both products are faster after a fast copy of grad into the feature's layout.

    Measured on Zen 4 with 256 to 1,024 channels: in float32 they took 1.4 to 1.7 times as long from two layouts as from
    one and the copy; in bfloat16 1.09 times for two images, but 0.95 for one, which is one matrix product either way.
    """
    if grad.device.type != "cpu":
        return False
    if grad.dtype == torch.bfloat16 and grad.shape[0] == 1 and aten.onednn_multiplies(grad.dtype):
        return False
    return result_format(grad) != feature_format and not grad.is_contiguous(memory_format=feature_format)


def merge_gradients(
    path: str,
    grad: Tensor,
    top_size: Sequence[int],
    upstream: Tensor | None,
    wants_bias: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the coarser map, of which `upstream` is a part, and the gradient of the bias if wanted."""
    if wants_bias:
        result: tuple[Tensor, Tensor] = MERGE_BACKWARD.on(path)(grad, top_size, upstream, **options)
        return result
    grad_top = UPSAMPLE_ADD_BACKWARD.on(path)(grad, top_size, **options)
    return grad_top if upstream is None else grad_top + upstream, None


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    wants_feature, wants_weight, wants_bias, wants_top = ctx.wants[:4]
    feature, weight = ctx.saved_tensors
    path = path_of(grad, feature, weight)
    grad_feature = grad_weight = grad_bias = grad_top = None
    if wants_top:
        options = {"mode": ctx.mode, "gain": ctx.gain}
        grad_top, grad_bias = merge_gradients(path, grad, ctx.top_size, None, wants_bias, options)
        wants_bias = False
    elif wants_bias and not wants_weight:
        grad_bias = sum_per_channel(grad, ctx.gain)
    if wants_feature or wants_weight:
        grad = aligned(path, grad, ctx.feature_format)
    if wants_feature:
        grad_feature = feature_gradient(path, grad, weight, ctx.gain, ctx.feature_format)
    if wants_weight:
        grad_weight, bias = weight_gradient(grad, feature, ctx.weight_shape, ctx.gain, wants_bias)
        grad_bias = bias if wants_bias else grad_bias
    return grad_feature, grad_weight, grad_bias, grad_top
