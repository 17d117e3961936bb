"""`upsample_add` and its backward by plain PyTorch: every device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import resampling
from fpn_kernels.operators.layouts import result_format
from fpn_kernels.operators.sums import HALVES, sum_dtype, sum_per_channel
from fpn_kernels.operators.upsample_add.call import MergeBackward, UpsampleAdd, UpsampleAddBackward


def _interpolate_reads_the_same(top: Tensor, size: tuple[int, int], mode: str) -> bool:
    """Whether `F.interpolate` reads the pixels that `resampling.source_index` names."""
    if top.device.type == "cuda":
        return True  # float32 indices in every dtype and layout (read: UpSample.cuh)
    if top.device.type != "cpu":
        return False
    return all(
        resampling.indices_agree(before, after, mode, top.dtype)
        for before, after in zip(top.shape[2:], size, strict=True)
    )


def resize(top: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "bilinear":
        return F.interpolate(top, size=size, mode=mode, align_corners=False)
    if _interpolate_reads_the_same(top, size, mode):
        return F.interpolate(top, size=size, mode=mode)
    rows = resampling.source_index(top.shape[2], size[0], mode, top.device)
    columns = resampling.source_index(top.shape[3], size[1], mode, top.device)
    return top.index_select(2, rows).index_select(3, columns)


def merge(top: Tensor, lateral: Tensor, mode: str, gain: float, out: Tensor) -> Tensor:
    """``out = gain * (lateral + resize(top))``, rounded once; `out` may be `lateral` itself."""
    size = (lateral.shape[2], lateral.shape[3])
    if lateral.dtype in HALVES and (mode == "bilinear" or gain != 1.0):
        # A 16-bit bilinear value, or a 16-bit sum that is scaled afterwards, would be rounded twice.
        resized = resize(top.float() * gain, size, mode)
        return torch.add(resized, lateral, alpha=gain, out=out)
    torch.add(lateral, resize(top, size, mode), out=out)
    return out if gain == 1.0 else out.mul_(gain)


def upsample_add(call: UpsampleAdd) -> Tensor:
    return merge(call.top, call.lateral, call.mode, call.gain, call.allocate())


def _sum_by_source(grad: Tensor, dim: int, source: Tensor, in_size: int, longest: int) -> Tensor:
    """Sum the slices of `grad` along `dim` that share a source pixel, in a fixed order."""
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
    # Clamped indices read the first and the last pixel up to half a scale more often.
    longest = min(2 * resampling.longest_range(in_size, out_size), out_size)
    below = _sum_by_source(grad * (1 - weight), dim, lower, in_size, longest)
    return below.add_(_sum_by_source(grad * weight, dim, upper, in_size, longest))


def _aten_adjoint_is_exact(grad: Tensor, top_size: Sequence[int], mode: str) -> bool:
    """Whether ATen's own backward is the adjoint of the forward, and deterministic.

    On the CPU it is, for every pair of sizes (measured on torch 2.13 against `resampling.source_index`).  On CUDA
    the bilinear one adds atomically, and the nearest ones take their ranges from a rounded inverse ratio, which is
    exact only where the sizes are equal or double.
    """
    if grad.device.type == "cpu":
        return True
    doubles = all(big in (small, 2 * small) for small, big in zip(top_size, grad.shape[2:], strict=True))
    return grad.device.type == "cuda" and mode == "nearest" and doubles


def upsample_add_backward(call: UpsampleAddBackward) -> Tensor:
    grad, top_size, mode, gain = call
    shape = call.shape()
    exact = _aten_adjoint_is_exact(grad, top_size, mode)
    # To round once, a 16-bit sum that is scaled afterwards, or made axis by axis, is carried in float32.
    work = grad if exact and gain == 1.0 else grad.to(sum_dtype(grad.dtype))
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
    return result.to(grad.dtype).contiguous(memory_format=result_format(grad))


def merge_backward(call: MergeBackward) -> tuple[Tensor, Tensor]:
    grad_top = upsample_add_backward(call.adjoint())
    if call.upstream is not None:
        grad_top = grad_top.add_(call.upstream)
    return grad_top, sum_per_channel(call.grad, call.gain)
