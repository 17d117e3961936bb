"""A pyramid computed from blocks: the top-down pathway, then the output convolutions.

A block with fused parameters is computed by a fused call.  Any other block is called as a module, as often and in the
same order as in the original network, and `upsample_add` merges its result.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels import functional
from fpn_kernels.modules.fusing import Parameters, fused_parameters, is_autocast, is_identity
from fpn_kernels.operators.layouts import result_format
from fpn_kernels.operators.output_conv.layout import best_format

GAINS = {"sum": 1.0, "avg": 0.5}

FindParameters = Callable[[nn.Module, int], Parameters | None]
_Level = tuple[Tensor, nn.Module, Parameters | None]  # feature, lateral block and its parameters


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which a network calls its blocks; it matters where a call changes state or its input.

    Attributes:
        laterals_first: whether all lateral blocks are called before the first merge, the finest first; else each before
            its merge, the coarsest first.
        outputs: "with its merge" if each output block is called after the merge of its level; "finest first" or
            "coarsest first" if all are called after the last merge.
    """

    laterals_first: bool
    outputs: str


LEVEL_BY_LEVEL = Order(laterals_first=False, outputs="with its merge")


def pyramid(
    features: Sequence[Tensor],
    inner_blocks: Sequence[nn.Module],
    output_blocks: Sequence[nn.Module],
    *,
    order: Order = LEVEL_BY_LEVEL,
    mode: str = "nearest",
    gain: float = 1.0,
    scale_factor: int | None = None,
    find_parameters: FindParameters = fused_parameters,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """The merged maps and the output maps, finest first.

    A block with fused parameters has no side effect, so its call may be moved.  If one of the output blocks has none,
    all calls keep the network's order, on maps in the caller's layout.

    The merged maps have the layout in which the output convolutions are fastest; `in_layout_of` converts one to the
    caller's layout, which every output map has.

    Args:
        features: the maps of the backbone, finest first.
        inner_blocks: the lateral block of each level.
        output_blocks: the output blocks of the finest levels; there may be fewer than levels.
        order: the network's order of calls.
        mode: as in `fpn_kernels.upsample_add`.
        gain: factor on each merge.
        scale_factor: None to resize each map to the size of the next finer one.  A number to enlarge each map by it;
            another size is then the error (or the broadcast) of PyTorch's addition.
        find_parameters: returns the weight and bias of a block, or None where it must run as a module.
    """
    inner = [find_parameters(block, 1) for block in inner_blocks]
    outer = [find_parameters(block, 3) for block in output_blocks]
    levels = list(zip(features, inner_blocks, inner, strict=True))
    resize = {"mode": mode, "gain": gain, "scale_factor": scale_factor}
    opaque = [block for block, parameters in zip(output_blocks, outer, strict=True) if parameters is None]
    if not all(map(is_identity, opaque)):
        return _in_order(features, _merges(levels, order, resize), output_blocks, outer, order)
    given = [parameters for parameters in inner if parameters is not None]
    merged: Sequence[Tensor]
    if len(given) == len(levels) and all(_fits(top, fine, scale_factor) for fine, top in itertools.pairwise(features)):
        weights, biases = zip(*given, strict=True)
        memory_format = _merged_format(features, outer)
        merged = functional.top_down_pathway(
            features, weights, biases, mode=mode, gain=gain, memory_format=memory_format
        )
    else:
        merged = list(_merges(levels, order, resize))[::-1]
    return merged, [
        in_layout_of(feature, level) if output is None else output
        for feature, level, output in zip(features, merged, _output_maps(features, merged, outer), strict=False)
    ]


def _merged_format(features: Sequence[Tensor], outputs: Sequence[Parameters | None]) -> torch.memory_format:
    """The layout of the merged maps in which the output convolutions are fastest."""
    given = [parameters[0] for parameters in outputs if parameters is not None]
    if not given:
        return torch.preserve_format
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *features))
    return best_format(features[0], recorded=recorded)


def _merges(levels: Sequence[_Level], order: Order, resize: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the merged maps, coarsest first.  Each is computed lazily, in the layout of its feature."""
    laterals = [
        block(feature) if order.laterals_first and parameters is None else None for feature, block, parameters in levels
    ]
    top = None
    for (feature, block, parameters), lateral in zip(levels[::-1], laterals[::-1], strict=True):
        if lateral is None:
            top = merge_level(feature, block, parameters, top, **resize)
        else:
            top = lateral if top is None else add_top(lateral, top, **resize)
        yield top


def _in_order(
    features: Sequence[Tensor],
    merges: Iterable[Tensor],
    blocks: Sequence[nn.Module],
    outer: Sequence[Parameters | None],
    order: Order,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """`pyramid` with all calls in the network's order."""
    merged: list[Tensor] = []
    results: dict[int, Tensor] = {}

    def output(level: int, top: Tensor) -> None:
        parameters = outer[level]
        results[level] = blocks[level](top) if parameters is None else _output_map(features[level], top, parameters)

    for top in merges:
        merged.insert(0, top)
        level = len(features) - len(merged)
        if order.outputs == "with its merge" and level < len(outer):
            output(level, top)
    if order.outputs != "with its merge":
        levels = range(len(outer))
        for level in levels if order.outputs == "finest first" else reversed(levels):
            output(level, merged[level])
    return merged, [results[level] for level in range(len(outer))]


def _output_map(feature: Tensor, merged: Tensor, parameters: Parameters) -> Tensor:
    return functional.output_conv(merged, *parameters, memory_format=result_format(feature))


def _output_maps(
    features: Sequence[Tensor], merged: Sequence[Tensor], outputs: Sequence[Parameters | None]
) -> list[Tensor | None]:
    """The output map of each level that has parameters, in the layout of its feature; None for the other levels."""
    given = {level: parameters for level, parameters in enumerate(outputs) if parameters is not None}
    kinds = {(result_format(features[n]), merged[n].dtype) for n in given}
    if len(kinds) == 1:  # one call for all levels
        weights, biases = zip(*given.values(), strict=True)
        memory_format, _ = kinds.pop()
        maps = functional.output_conv_levels([merged[n] for n in given], weights, biases, memory_format=memory_format)
        results = dict(zip(given, maps, strict=True))
    else:
        results = {n: _output_map(features[n], merged[n], parameters) for n, parameters in given.items()}
    return [results.get(level) for level in range(len(outputs))]


def in_layout_of(feature: Tensor, merged: Tensor) -> Tensor:
    """A merged map in the layout of its feature; the map itself where it has that layout."""
    wanted = result_format(feature)
    return merged if result_format(merged) == wanted else functional.reorder(merged, wanted)


def merge_level(
    feature: Tensor,
    block: nn.Module,
    parameters: Parameters | None,
    top: Tensor | None,
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    scale_factor: int | None = None,
) -> Tensor:
    """The merged map of one level: ``gain * (block(feature) + resize(top))``, or ``block(feature)`` without `top`."""
    if parameters is not None and _can_merge(feature, top, scale_factor):
        return functional.lateral_connection(feature, *parameters, top, mode=mode, gain=gain)
    lateral: Tensor = block(feature) if parameters is None else functional.lateral_connection(feature, *parameters)
    return lateral if top is None else add_top(lateral, top, mode=mode, gain=gain, scale_factor=scale_factor)


def add_top(
    lateral: Tensor, top: Tensor, *, mode: str = "nearest", gain: float = 1.0, scale_factor: int | None = None
) -> Tensor:
    """``gain * (lateral + resize(top))``, also for two dtypes and for sizes that do not match `scale_factor`."""
    if not _fits(top, lateral, scale_factor):
        align_corners = False if mode == "bilinear" else None
        enlarged = F.interpolate(top, scale_factor=scale_factor, mode=mode, align_corners=align_corners)
        return gain * (lateral + enlarged)
    # A norm may return another dtype than the level above (GroupNorm under autocast: float32).
    dtype = torch.promote_types(lateral.dtype, top.dtype)
    return functional.upsample_add(top.to(dtype), lateral.to(dtype), mode=mode, gain=gain)


def _can_merge(feature: Tensor, top: Tensor | None, scale_factor: int | None) -> bool:
    if top is None:
        return True
    return (is_autocast(feature) or top.dtype == feature.dtype) and _fits(top, feature, scale_factor)


def _fits(top: Tensor, lateral: Tensor, scale_factor: int | None) -> bool:
    """Whether `top`, enlarged by `scale_factor`, has the size of `lateral`."""
    if scale_factor is None:
        return True
    sizes = zip(top.shape[-2:], lateral.shape[-2:], strict=True)
    return all(coarse * scale_factor == fine for coarse, fine in sizes)
