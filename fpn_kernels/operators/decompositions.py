"""Each operator in standard ones, for what runs without this library: ONNX, AOTInductor, a saved program.

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
from fpn_kernels.backends.eager import normalized
from fpn_kernels.backends.layouts import requested_format, result_format
from fpn_kernels.operators import registration
from fpn_kernels.operators.checks import (
    check_lateral_connection,
    check_output_conv,
    check_output_conv_levels,
    check_pathway,
    check_reorder,
    check_upsample_add,
    check_weighted_merge,
    sum_dtype,
)
from fpn_kernels.operators.levels import by_level

_HALVES = (torch.float16, torch.bfloat16)


def _source_index(in_size: int, out_size: int, mode: str, device: torch.device) -> Tensor:
    """`resampling.source_index` for sizes that may be symbolic: the ratio is a float32 tensor of the graph."""
    destination = torch.arange(out_size, device=device).to(torch.float32)
    if mode == "nearest-exact":
        destination = destination + 0.5
    before, after = (torch.full((), size, dtype=torch.float32, device=device) for size in (in_size, out_size))
    return (destination * (before / after)).floor().to(torch.int64).clamp(max=in_size - 1)


def _resize_along(top: Tensor, dim: int, out_size: int, mode: str) -> Tensor:
    in_size = top.shape[dim]
    if type(in_size) is int and type(out_size) is int and in_size == out_size:
        return top
    return top.index_select(dim, _source_index(in_size, out_size, mode, top.device))


def _resize(top: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "bilinear":
        return F.interpolate(top, size=size, mode=mode, align_corners=False)
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
    check_upsample_add(top, lateral, mode)
    return _merge(top, lateral, mode, gain).contiguous(memory_format=result_format(lateral))


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
    check_lateral_connection(feature, weight, bias, top, mode, memory_format)
    kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
    merged = F.conv2d(feature, kernel, bias)
    if top is not None:
        merged = _merge(top, merged, mode, gain)
    return merged.contiguous(memory_format=requested_format(feature, memory_format))


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
    check_pathway(features, weights, placed, mode, memory_format)
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
    check_output_conv(feature, weight, bias, memory_format)
    result = F.conv2d(feature, weight, bias, padding=1)
    return result.contiguous(memory_format=requested_format(feature, memory_format))


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
    check_output_conv_levels(features, weights, placed, memory_format)
    return [output_conv(*level, memory_format=memory_format) for level in zip(features, weights, placed, strict=True)]


def reorder(source: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    check_reorder(source, memory_format)
    return source.clone(memory_format=memory_format)


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
    check_weighted_merge(maps, weights, mode, normalization, eps)
    size, dtype = (first.shape[2], first.shape[3]), sum_dtype(first)
    factors = normalized(weights, first, normalization, eps)
    total = factors[0] * first.to(dtype)
    for index, other in enumerate(maps[1:], start=1):
        total = total + factors[index] * _resize(other.to(dtype), size, mode)
    return total.to(first.dtype).contiguous(memory_format=result_format(first))


# The weights keep their dtype under autocast.
weighted_merge = _after_autocast(_weighted_merge, maps=3)


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
    return {
        operators.upsample_add.default: upsample_add,
        operators.lateral_connection.default: lateral_connection,
        operators.output_conv.default: output_conv,
        operators.output_conv_levels.default: output_conv_levels,
        operators.reorder.default: reorder,
        operators.top_down_pathway.default: top_down_pathway,
        operators.weighted_merge.default: weighted_merge,
    }
