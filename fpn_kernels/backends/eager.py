"""Plain PyTorch: serves every call, on every device, in every dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import resampling
from fpn_kernels.backends import convolution, serving
from fpn_kernels.backends.layouts import allocate, requested_format, result_format
from fpn_kernels.backends.selection import Backend, Implementation, unprepared

_HALVES = (torch.float16, torch.bfloat16)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALVES else dtype


def sum_per_channel(grad: Tensor, gain: float) -> Tensor:
    """``gain * sum of grad[:, c]`` for each channel: the gradient of a bias, rounded once.  Differentiable."""
    return (grad.sum((0, 2, 3), dtype=_sum_dtype(grad.dtype)) * gain).to(grad.dtype)


def _interpolate_reads_the_same(top: Tensor, size: tuple[int, int], mode: str) -> bool:
    """Whether `F.interpolate` is sure to read the pixels that `resampling.source_index` names."""
    if top.device.type == "cuda":
        return True  # float32 indices in every dtype and layout (read: UpSample.cuh)
    if top.device.type != "cpu":
        return False
    return all(
        resampling.indices_agree(before, after, mode, top.dtype)
        for before, after in zip(top.shape[2:], size, strict=True)
    )


def _resize(top: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "bilinear":
        return F.interpolate(top, size=size, mode=mode, align_corners=False)
    if _interpolate_reads_the_same(top, size, mode):
        return F.interpolate(top, size=size, mode=mode)
    rows = resampling.source_index(top.shape[2], size[0], mode, top.device)
    columns = resampling.source_index(top.shape[3], size[1], mode, top.device)
    return top.index_select(2, rows).index_select(3, columns)


def _merge(top: Tensor, lateral: Tensor, mode: str, gain: float, out: Tensor) -> Tensor:
    """``out = gain * (lateral + resize(top))``, rounded once; `out` may be `lateral` itself."""
    size = (lateral.shape[2], lateral.shape[3])
    if lateral.dtype in _HALVES and (mode == "bilinear" or gain != 1.0):
        # A 16-bit bilinear value, or a 16-bit sum that is scaled afterwards, would be rounded twice.
        resized = _resize(top.float() * gain, size, mode)
        return torch.add(resized, lateral, alpha=gain, out=out)
    torch.add(lateral, _resize(top, size, mode), out=out)
    return out if gain == 1.0 else out.mul_(gain)


def upsample_add(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Tensor:
    return _merge(top, lateral, mode, gain, allocate(lateral.shape, lateral, result_format(lateral)))


def _sum_by_source(grad: Tensor, dim: int, source: Tensor, in_size: int, longest: int) -> Tensor:
    """Adds up the slices of `grad` along `dim` that share a source pixel, in a fixed order."""
    start, stop = resampling.source_ranges(source, in_size)
    last = grad.shape[dim] - 1
    mask_shape = [-1 if d == dim else 1 for d in range(grad.dim())]
    total: Tensor | None = None
    for step in range(longest):
        index = start + step
        term = grad.index_select(dim, index.clamp(max=last))
        term = term.masked_fill((index >= stop).view(mask_shape), 0)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _adjoint_along(grad: Tensor, dim: int, in_size: int, mode: str) -> Tensor:
    out_size = grad.shape[dim]
    if mode != "bilinear":
        source = resampling.source_index(in_size, out_size, mode, grad.device)
        return _sum_by_source(grad, dim, source, in_size, resampling.longest_range(in_size, out_size))
    lower, upper, weight = resampling.bilinear_weights(in_size, out_size, grad.dtype, grad.device)
    weight = weight.view([-1 if d == dim else 1 for d in range(grad.dim())])
    # The first pixel is read with clamped indices by up to half a scale more, the last by as many.
    longest = min(2 * resampling.longest_range(in_size, out_size), out_size)
    below = _sum_by_source(grad * (1 - weight), dim, lower, in_size, longest)
    return below.add_(_sum_by_source(grad * weight, dim, upper, in_size, longest))


def _aten_adjoint_is_exact(grad: Tensor, top_size: tuple[int, int], mode: str) -> bool:
    """Whether ATen's own backward is the adjoint of the forward, and deterministic.

    On the CPU it is, for every pair of sizes (measured on torch 2.13 against `resampling.source_index`).  On CUDA
    the bilinear one adds atomically, and the nearest ones take their ranges from a rounded inverse ratio, which is
    exact only where the sizes are equal or double.
    """
    if grad.device.type == "cpu":
        return True
    doubles = all(big in (small, 2 * small) for small, big in zip(top_size, grad.shape[2:], strict=True))
    return grad.device.type == "cuda" and mode == "nearest" and doubles


def upsample_add_backward(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> Tensor:
    out_format = result_format(grad)
    shape = [*grad.shape[:2], *top_size]
    exact = _aten_adjoint_is_exact(grad, top_size, mode)
    # To round once, a 16-bit sum that is scaled afterwards, or made axis by axis, is carried in float32.
    work = grad if exact and gain == 1.0 else grad.to(_sum_dtype(grad.dtype))
    result: Tensor
    if not exact:
        result = _adjoint_along(_adjoint_along(work, 2, top_size[0], mode), 3, top_size[1], mode)
    elif mode == "bilinear":
        result = torch.ops.aten.upsample_bilinear2d_backward(work, grad.shape[2:], shape, False)
    elif mode == "nearest":
        result = torch.ops.aten.upsample_nearest2d_backward(work, grad.shape[2:], shape)
    else:
        result = torch.ops.aten._upsample_nearest_exact2d_backward(work, grad.shape[2:], shape)
    if gain != 1.0:
        result = result.mul_(gain)
    return result.to(grad.dtype).contiguous(memory_format=out_format)


def _no_check(*arguments: object) -> None:
    """The arguments are the library's own."""


def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> Tensor:
    out_format = requested_format(feature, memory_format)
    lateral = F.conv2d(feature, weight[:, :, None, None], bias)
    if top is None:
        return lateral.contiguous(memory_format=out_format)
    in_place = lateral.is_contiguous(memory_format=out_format)
    if in_place and lateral.device.type != "cpu":
        # One pass, and not two, where a kernel has the merge; on the CPU such a backend has the connection as well.
        merge = serving.prepare("upsample_add", top, lateral, mode, gain, check=_no_check, empty=upsample_add)
        if merge.backend != BACKEND.name:
            merged: Tensor = merge(top, lateral, mode, gain)
            return merged
    return _merge(top, lateral, mode, gain, lateral if in_place else allocate(lateral.shape, lateral, out_format))


def merge_backward(
    grad: Tensor, top_size: tuple[int, int], own: Tensor | None, mode: str, gain: float
) -> tuple[Tensor, Tensor]:
    grad_top = upsample_add_backward(grad, top_size, mode, gain)
    return grad_top if own is None else grad_top.add_(own), sum_per_channel(grad, gain)


def normalized(weights: Tensor, like: Tensor, normalization: str, eps: float) -> Tensor:
    """The factors of maps like `like`: weights in the dtype of the sums, made to add up to one.  Differentiable."""
    weights = weights.to(_sum_dtype(like.dtype))
    if normalization == "relu":
        return divided(weights, eps)[0]
    return torch.softmax(weights, 0) if normalization == "softmax" else weights


def divided(weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The positive parts of weights divided by their sum and eps; and what they were divided by."""
    positive = torch.relu(weights)
    total = positive.sum() + eps
    return positive / total, total


def weighted_merge(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> Tensor:
    factors = normalized(weights, first, normalization, eps)
    out = allocate(first.shape, first, result_format(first))
    size = (first.shape[2], first.shape[3])
    sums = out if out.dtype not in _HALVES else torch.empty_like(out, dtype=torch.float32)
    torch.mul(first.to(sums.dtype), factors[0], out=sums)
    for index, other in enumerate((second, third), start=1):
        if other is not None:
            other = other.to(sums.dtype)
            resized = other if other.shape == first.shape else _resize(other, size, mode)
            sums.add_(resized * factors[index])
    return out if sums is out else out.copy_(sums)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of two maps, summed in float32 (float64 for float64).  Differentiable."""
    dtype = _sum_dtype(left.dtype)
    return (left.to(dtype) * right.to(dtype)).sum()


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``factor * grad``, rounded once.  Differentiable.

    The factor of 16-bit maps is float32.  In a product of the two as they are, it is only a scalar on the CPU that
    PyTorch is known not to round to 16 bits first.
    """
    return (grad.to(factor.dtype) * factor).to(grad.dtype)


def weighted_merge_backward(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return scaled(grad, factor).contiguous(memory_format=result_format(grad)), inner_product(grad, input)


def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> Tensor:
    out_format = requested_format(feature, memory_format)
    return F.conv2d(feature, weight, bias, padding=1).contiguous(memory_format=out_format)


def output_conv_backward_weight(
    grad: Tensor, feature: Tensor, wants_bias: bool, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    return convolution.gradient_of_weight(grad, feature, wants_bias, memory_format)


def channel_sums(source: Tensor) -> Tensor:
    return sum_per_channel(source, 1.0)


def reorder(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    return allocate(source.shape, source, memory_format).copy_(source)


def _serves_all(*arguments: object) -> None:
    return None


def _evidence(operator: str) -> Callable[..., str]:
    one_merge = "; on CUDA with one merge by the backend that serves upsample_add" * (operator == "lateral_connection")
    return lambda *arguments: f"PyTorch's own operators{one_merge}"


BACKEND = Backend(
    name="eager",
    unavailable=lambda: None,
    implementations={
        run.__name__: Implementation(unprepared(run), _serves_all, evidence=_evidence(run.__name__))
        for run in (
            *(upsample_add, upsample_add_backward, lateral_connection, merge_backward),
            *(weighted_merge, weighted_merge_backward, output_conv, output_conv_backward_weight, reorder),
            channel_sums,
        )
    },
)
