"""`upsample_add` and its backward in standard PyTorch operators, for tracers, transforms and exporters.

The nearest resize is ATen's own (in ONNX: Resize, asymmetric and floor) where the sizes are known and every way to
compute the index agrees, as at the ratio 2.  Elsewhere the index is computed in the graph as in
`resampling.source_index`: ONNX divides by ``float32(out / in)`` where PyTorch multiplies by ``float32(in / out)``, and
reads another pixel at 209 of the 7,021 pairs in < 60, out < 120 (measured on onnxruntime 1.31, CPU).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import resampling
from fpn_kernels.operators import paths
from fpn_kernels.operators.layouts import requested_format
from fpn_kernels.operators.sums import HALVES, sum_dtype, sum_per_channel
from fpn_kernels.operators.upsample_add.call import MergeBackward, UpsampleAdd, UpsampleAddBackward


def laid_out(result: Tensor, like: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    """The result in the requested layout; where the call is watched, PyTorch's operators choose the layout."""
    if paths.is_watched():
        return result
    return result.contiguous(memory_format=requested_format(like, memory_format))


def _number(size: Any, device: torch.device) -> Tensor:
    """A size as a float32 tensor of the graph; in a traced call it is a tensor already."""
    if isinstance(size, Tensor):
        return size.to(device=device, dtype=torch.float32)
    return torch.full((), size, dtype=torch.float32, device=device)


def _source_index(in_size: int, out_size: int, mode: str, device: torch.device) -> Tensor:
    """`resampling.source_index` for sizes that may be symbolic: the ratio is a float32 tensor of the graph."""
    destination = torch.arange(out_size, dtype=torch.int64, device=device).to(torch.float32)
    if mode == "nearest-exact":
        destination = destination + 0.5
    ratio = _number(in_size, device) / _number(out_size, device)
    return (destination * ratio).floor().to(torch.int64).clamp(max=in_size - 1)


def _resize_along(top: Tensor, dim: int, out_size: int, mode: str) -> Tensor:
    in_size = top.shape[dim]
    if type(in_size) is int and type(out_size) is int and in_size == out_size:
        return top
    return top.index_select(dim, _source_index(in_size, out_size, mode, top.device))


def resize(top: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "bilinear":
        return F.interpolate(top, size=size, mode=mode, align_corners=False)
    if paths.is_tracing() and not torch.onnx.is_in_onnx_export():
        return F.interpolate(top, size=size, mode=mode)  # what tracing eager PyTorch records
    pairs = list(zip(top.shape[2:], size, strict=True))
    # Symbolic sizes are not compared: that would fix the program to the sizes it was traced with.
    static = all(type(in_size) is int and type(out_size) is int for in_size, out_size in pairs)
    if mode == "nearest" and static and all(resampling.formulas_agree(*pair) for pair in pairs):
        return F.interpolate(top, size=size, mode=mode)
    # Columns first, while the map is small: onnxruntime copies whole rows, but columns one element at a time (19 ms
    # against 36 ms in the other order, and 4 ms for its Resize: 256 x 50 x 80 to 99 x 159, float32, 2 Zen 5 cores).
    return _resize_along(_resize_along(top, 3, size[1], mode), 2, size[0], mode)


def merge(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Tensor:
    """``gain * (lateral + resize(top))``, rounded once."""
    dtype = lateral.dtype
    if dtype in HALVES and (mode == "bilinear" or gain != 1.0):
        # A 16-bit bilinear value, or a 16-bit sum that is scaled afterwards, would be rounded twice.
        top, lateral = top.float(), lateral.float()
    merged = lateral + resize(top, (lateral.shape[2], lateral.shape[3]), mode)
    return (merged if gain == 1.0 else merged * gain).to(dtype)


def upsample_add(call: UpsampleAdd) -> Tensor:
    return laid_out(merge(call.top, call.lateral, call.mode, call.gain), call.lateral)


def _adjoint_along(grad: Tensor, dim: int, in_size: int, mode: str) -> Tensor:
    index = _source_index(in_size, grad.shape[dim], mode, grad.device)
    shape = [in_size if axis == dim else size for axis, size in enumerate(grad.shape)]
    return grad.new_zeros(shape).index_add(dim, index, grad)


def upsample_add_backward(call: UpsampleAddBackward) -> Tensor:
    grad, top_size, mode, gain = call
    wide = grad.to(sum_dtype(grad.dtype)) * gain
    if mode == "bilinear":
        shape = call.shape()
        result = torch.ops.aten.upsample_bilinear2d_backward.default(wide, grad.shape[2:], shape, False)
    else:
        result = _adjoint_along(_adjoint_along(wide, 2, top_size[0], mode), 3, top_size[1], mode)
    return laid_out(result.to(grad.dtype), grad)


def merge_backward(call: MergeBackward) -> tuple[Tensor, Tensor]:
    grad_top = upsample_add_backward(call.adjoint())
    if call.upstream is not None:
        grad_top = grad_top + call.upstream
    return grad_top, sum_per_channel(call.grad, call.gain)
