"""Each operator in standard ones: for what runs without this library (ONNX, AOTInductor, a saved program), and for
what has to see standard operators (`direct.is_watched`: functorch, forward-mode AD, the TorchScript tracer).

The nearest resize is ATen's own (ONNX: Resize, asymmetric and floor) where the sizes are known and every way to
compute the index agrees, which they do at the ratio 2.  Elsewhere it reads by an index that is computed in the graph
as `resampling.source_index` computes it: ONNX divides by ``float32(out / in)`` where PyTorch multiplies by
``float32(in / out)``, and reads another pixel at 209 of the 7,021 pairs in < 60, out < 120 (measured on onnxruntime
1.31, CPU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import resampling
from fpn_kernels.backends import convolution
from fpn_kernels.backends.eager import inner_product, normalized, scaled, sum_per_channel
from fpn_kernels.backends.layouts import requested_format
from fpn_kernels.operators import direct, registration
from fpn_kernels.operators.checks import (
    check_adjoint,
    check_lateral_connection,
    check_map,
    check_output_conv,
    check_output_conv_backward_weight,
    check_output_conv_levels,
    check_pathway,
    check_reorder,
    check_upsample_add,
    check_weighted_merge,
    check_weighted_merge_backward,
    sum_dtype,
)
from fpn_kernels.operators.levels import by_level

_HALVES = (torch.float16, torch.bfloat16)


def _check(check: Callable[..., None], *arguments: Any) -> None:
    """Checks a call, but for a tracer: it would record each comparison of sizes, and PyTorch's own operators check."""
    if not direct.is_tracing():
        check(*arguments)


def _laid_out(result: Tensor, like: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    """The result in the layout asked for; where the call is watched, layouts are left to PyTorch's operators."""
    if direct.is_watched():
        return result
    return result.contiguous(memory_format=requested_format(like, memory_format))


def _number(size: Any, device: torch.device) -> Tensor:
    """A size as a float32 tensor of the graph; of a traced call it is a tensor already."""
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


def _resize(top: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "bilinear":
        return F.interpolate(top, size=size, mode=mode, align_corners=False)
    if direct.is_tracing() and not torch.onnx.is_in_onnx_export():
        return F.interpolate(top, size=size, mode=mode)  # what tracing eager PyTorch records
    pairs = list(zip(top.shape[2:], size, strict=True))
    # Symbolic sizes are not compared: that would fix the program to the sizes it was traced with.
    static = all(type(in_size) is int and type(out_size) is int for in_size, out_size in pairs)
    if mode == "nearest" and static and all(resampling.formulas_agree(*pair) for pair in pairs):
        return F.interpolate(top, size=size, mode=mode)
    # Columns first, while the map is small: onnxruntime copies whole rows, but columns one element at a time (19 ms
    # against 36 the other way round, and 4 for its Resize: 256 x 50 x 80 to 99 x 159, float32, on 2 Zen 5 cores).
    return _resize_along(_resize_along(top, 3, size[1], mode), 2, size[0], mode)


def _merge(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Tensor:
    """``gain * (lateral + resize(top))``, rounded once."""
    dtype = lateral.dtype
    if dtype in _HALVES and (mode == "bilinear" or gain != 1.0):
        # A 16-bit bilinear value, or a 16-bit sum that is scaled afterwards, would be rounded twice.
        top, lateral = top.float(), lateral.float()
    merged = lateral + _resize(top, (lateral.shape[2], lateral.shape[3]), mode)
    return (merged if gain == 1.0 else merged * gain).to(dtype)


def _after_autocast(run: Callable[..., Any], maps: int | None = None) -> Callable[..., Any]:
    """Casts as autocast does for the operator (`registration.autocast`), and keeps it away from what is inside."""

    @functools.wraps(run)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        first = arguments[0]
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device_type):
            return run(*arguments, **keywords)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            cut = len(arguments) if maps is None else maps
            return run(*(registration.cast(value, dtype) for value in arguments[:cut]), *arguments[cut:], **keywords)

    return wrapper


@_after_autocast
def upsample_add(top: Tensor, lateral: Tensor, *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    _check(check_upsample_add, top, lateral, mode)
    return _laid_out(_merge(top, lateral, mode, gain), lateral)


@_after_autocast
def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    _check(check_lateral_connection, feature, weight, bias, top, mode, memory_format)
    kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
    merged = F.conv2d(feature, kernel, bias)
    if top is not None:
        merged = _merge(top, merged, mode, gain)
    return _laid_out(merged, feature, memory_format)


@_after_autocast
def top_down_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    placed = by_level(biases, bias_levels, len(features))
    _check(check_pathway, features, weights, placed, mode, memory_format)
    merged: list[Tensor] = []
    top: Tensor | None = None
    for feature, weight, placed_bias in zip(reversed(features), reversed(weights), reversed(placed), strict=True):
        top = lateral_connection(feature, weight, placed_bias, top, mode=mode, gain=gain, memory_format=memory_format)
        merged.append(top)
    return merged[::-1]


@_after_autocast
def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, *, memory_format: torch.memory_format | None = None
) -> Tensor:
    _check(check_output_conv, feature, weight, bias, memory_format)
    return _laid_out(F.conv2d(feature, weight, bias, padding=1), feature, memory_format)


@_after_autocast
def output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    placed = by_level(biases, bias_levels, len(features))
    _check(check_output_conv_levels, features, weights, placed, memory_format)
    return [output_conv(*level, memory_format=memory_format) for level in zip(features, weights, placed, strict=True)]


def reorder(source: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    _check(check_reorder, source, memory_format)
    return source.clone() if direct.is_watched() else source.clone(memory_format=memory_format)


def _weighted_merge(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    *,
    mode: str = "nearest",
    normalization: str = "none",
    eps: float = 0.0,
) -> Tensor:
    maps = (first, second) if third is None else (first, second, third)
    _check(check_weighted_merge, maps, weights, mode, normalization, eps)
    size, dtype = (first.shape[2], first.shape[3]), sum_dtype(first)
    factors = normalized(weights, first, normalization, eps)
    total = factors[0] * first.to(dtype)
    for index, other in enumerate(maps[1:], start=1):
        total = total + factors[index] * _resize(other.to(dtype), size, mode)
    return _laid_out(total.to(first.dtype), first)


# The weights keep their dtype under autocast.
weighted_merge = _after_autocast(_weighted_merge, maps=3)


def _adjoint_along(grad: Tensor, dim: int, in_size: int, mode: str) -> Tensor:
    index = _source_index(in_size, grad.shape[dim], mode, grad.device)
    shape = [in_size if axis == dim else size for axis, size in enumerate(grad.shape)]
    return grad.new_zeros(shape).index_add(dim, index, grad)


def upsample_add_backward(grad: Tensor, top_size: Sequence[int], *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    _check(check_adjoint, grad, top_size, mode)
    wide = grad.to(sum_dtype(grad)) * gain
    if mode == "bilinear":
        shape = [*grad.shape[:2], *top_size]
        result = torch.ops.aten.upsample_bilinear2d_backward.default(wide, grad.shape[2:], shape, False)
    else:
        result = _adjoint_along(_adjoint_along(wide, 2, top_size[0], mode), 3, top_size[1], mode)
    return _laid_out(result.to(grad.dtype), grad)


def merge_backward(
    grad: Tensor, top_size: Sequence[int], own: Tensor | None, *, mode: str = "nearest", gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    _check(check_adjoint, grad, top_size, mode, own)
    grad_top = upsample_add_backward(grad, top_size, mode=mode, gain=gain)
    return grad_top if own is None else grad_top + own, sum_per_channel(grad, gain)


def weighted_merge_backward(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    _check(check_weighted_merge_backward, grad, input, factor)
    return _laid_out(scaled(grad, factor), grad), inner_product(grad, input)


def output_conv_backward_weight(
    grad: Tensor, feature: Tensor, *, wants_bias: bool = True, memory_format: torch.memory_format | None = None
) -> tuple[Tensor, Tensor]:
    _check(check_output_conv_backward_weight, grad, feature, memory_format)
    _, of_weight, of_bias = convolution.gradients(grad, feature, None, wants_bias)
    return of_weight, grad.new_empty(0) if of_bias is None else of_bias


def channel_sums(source: Tensor) -> Tensor:
    _check(check_map, "source", source)
    return sum_per_channel(source, 1.0)


for _form in (
    *(upsample_add, upsample_add_backward, merge_backward, lateral_connection, top_down_pathway),
    *(output_conv, output_conv_levels, output_conv_backward_weight, channel_sums, reorder),
    *(weighted_merge, weighted_merge_backward),
):
    setattr(direct.STANDARD, _form.__name__.removeprefix("_"), _form)


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The forward operators of this library as standard PyTorch ones, for `ExportedProgram.run_decompositions`.

    A program exported from a fused module keeps the operators ``fpn_kernels::*``, and so the kernels behind them,
    but needs this library wherever it runs.  One line takes them out, and the program then runs in ONNX runtimes,
    in AOTInductor packages and saved programs on machines without the library.

    ``torch.onnx.export(model, (images,), "model.onnx", dynamo=True)`` of a module decomposes by itself.

    The same pixels are read at every pair of sizes, static or dynamic; the sums are PyTorch's, or the runtime's own.
    The operators of the backward are not in the table: they appear where gradients are computed, in no program that
    `torch.export.export` writes.

    Returns:
        Operator to decomposition.  Standard operators are not in it: what the program holds of them stays.

    Cost:
        Moves no bytes.  The standard operators move what eager PyTorch does, unless a compiler fuses them.

    Source:
        `torch.export.ExportedProgram.run_decompositions`; `torch.nn.functional.interpolate`, its indices written out.

    Example:
        ```python
        program = torch.export.export(fpn.eval(), (features,))
        program = program.run_decompositions(fpn_kernels.decompositions())
        torch.export.save(program, "model.pt2")
        ```
    """
    operators = torch.ops.fpn_kernels
    forward = (upsample_add, lateral_connection, output_conv, output_conv_levels, reorder, top_down_pathway)
    table = {getattr(operators, form.__name__).default: form for form in forward}
    return {**table, operators.weighted_merge.default: weighted_merge}
