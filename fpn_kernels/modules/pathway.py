"""A pyramid over the blocks that hold its parameters: the top-down pathway, and the output maps.

Every block that a fused call can stand in for is given to one; any other is called as the module it is, as often and
in the order as in the network that it is from, and its result merged by `upsample_add`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels import functional
from fpn_kernels.modules.fusing import Parameters, fused_parameters, is_autocast, is_identity
from fpn_kernels.operators.layouts import result_format

GAINS = {"sum": 1.0, "avg": 0.5}

FindParameters = Callable[[nn.Module, int], Parameters | None]


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order a network calls its blocks, which shows where a call changes state or its input.

    Attributes:
        laterals_first: all lateral blocks are called before the first merge, the finest first; else each before its
            merge, the coarsest first.
        outputs: each output block is called "with its merge", or all are once all levels are merged, "finest first"
            or "coarsest first".
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
    """The merged maps, finest first, and the output maps of the finest levels, as many as there are output blocks.

    Blocks that a fused call stands in for have no effect of their own, so the order of their calls is free.  Where
    one of the output blocks is not such a block, all calls are in the network's order, on maps in the caller's layout.

    The merged maps lie in memory as the output convolutions read them fastest; `in_layout_of` takes one out in the
    caller's layout, which every output map has.

    Args:
        features: the backbone's maps, finest first.
        inner_blocks: the lateral block of each level.
        output_blocks: the output block of each level, from the finest on.
        order: the network's order of calls.
        mode: as in `fpn_kernels.upsample_add`.
        gain: factor on each merge.
        scale_factor: None where a map is resized to the size of the one it is added to; a number where it is
            enlarged by that, so that other sizes are the error (or the broadcast) of PyTorch's own sum.
        find_parameters: gives the weight and bias of a block, or None where it must run as a module.
    """
    inner = [find_parameters(block, 1) for block in inner_blocks]
    outer = [find_parameters(block, 3) for block in output_blocks]
    resize = {"mode": mode, "gain": gain, "scale_factor": scale_factor}
    opaque = [block for block, parameters in zip(output_blocks, outer, strict=True) if parameters is None]
    if all(map(is_identity, opaque)):
        merged = _merge_all(features, inner_blocks, inner, order, resize, _merged_format(features, outer))
        convolved = _output_maps(features, merged, outer)
        return merged, [
            in_layout_of(feature, level) if output is None else output
            for feature, level, output in zip(features, merged, convolved, strict=False)
        ]
    return _in_order(features, inner_blocks, inner, output_blocks, outer, order, resize)


def _merged_format(features: Sequence[Tensor], outputs: Sequence[Parameters | None]) -> torch.memory_format:
    """The layout in which the output convolutions read the merged maps fastest."""
    given = [parameters[0] for parameters in outputs if parameters is not None]
    if not given:
        return torch.preserve_format
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *features))
    return functional.output_conv_format(features[0], recorded=recorded)


def _merge_all(
    features: Sequence[Tensor],
    blocks: Sequence[nn.Module],
    parameters: Sequence[Parameters | None],
    order: Order,
    resize: dict[str, Any],
    memory_format: torch.memory_format,
) -> Sequence[Tensor]:
    """The merged maps, finest first: one fused call where every block has parameters."""
    given = [each for each in parameters if each is not None]
    if len(given) == len(blocks) and all(
        _fits(top, feature, resize["scale_factor"]) for feature, top in itertools.pairwise(features)
    ):
        weights, biases = zip(*given, strict=True)
        return functional.top_down_pathway(
            features, weights, biases, mode=resize["mode"], gain=resize["gain"], memory_format=memory_format
        )
    return list(_merges(features, blocks, parameters, order, resize))[::-1]


def _merges(
    features: Sequence[Tensor],
    blocks: Sequence[nn.Module],
    parameters: Sequence[Parameters | None],
    order: Order,
    resize: dict[str, Any],
) -> Iterator[Tensor]:
    """Yield the merged maps, coarsest first.  Each is computed lazily, in the layout of its feature."""
    laterals: list[Tensor | None] = [None] * len(features)
    if order.laterals_first:
        for level, (block, found) in enumerate(zip(blocks, parameters, strict=True)):
            laterals[level] = block(features[level]) if found is None else None
    top = None
    for level in reversed(range(len(features))):
        lateral = laterals[level]
        if lateral is None:
            top = merge_level(features[level], blocks[level], parameters[level], top, **resize)
        elif top is None:
            top = lateral
        else:
            top = add_top(lateral, top, **resize)
        yield top


def _in_order(
    features: Sequence[Tensor],
    inner_blocks: Sequence[nn.Module],
    inner: Sequence[Parameters | None],
    output_blocks: Sequence[nn.Module],
    outer: Sequence[Parameters | None],
    order: Order,
    resize: dict[str, Any],
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """`pyramid` with every call where the network has it."""
    merged: list[Tensor] = []  # coarsest first
    results: dict[int, Tensor] = {}

    def output(level: int) -> None:
        feature, parameters = merged[len(features) - 1 - level], outer[level]
        if parameters is None:
            results[level] = output_blocks[level](feature)
        else:
            results[level] = functional.output_conv(feature, *parameters, memory_format=result_format(features[level]))

    for top in _merges(features, inner_blocks, inner, order, resize):
        merged.append(top)
        level = len(features) - len(merged)
        if order.outputs == "with its merge" and level < len(outer):
            output(level)
    if order.outputs != "with its merge":
        levels = range(len(outer))
        for level in levels if order.outputs == "finest first" else reversed(levels):
            output(level)
    return merged[::-1], [results[level] for level in range(len(outer))]


def _output_maps(
    features: Sequence[Tensor], merged: Sequence[Tensor], outputs: Sequence[Parameters | None]
) -> list[Tensor | None]:
    """The output map of each level whose block has parameters, in the layout of its feature; None for the others."""
    given = {level: parameters for level, parameters in enumerate(outputs) if parameters is not None}
    results: list[Tensor | None] = [None] * len(outputs)
    kinds = {(result_format(features[n]), merged[n].dtype) for n in given}
    if len(kinds) == 1:
        weights, biases = zip(*given.values(), strict=True)
        memory_format, _ = kinds.pop()
        maps = functional.output_conv_levels([merged[n] for n in given], weights, biases, memory_format=memory_format)
        for level, result in zip(given, maps, strict=True):
            results[level] = result
        return results
    for level, parameters in given.items():
        memory_format = result_format(features[level])
        results[level] = functional.output_conv(merged[level], *parameters, memory_format=memory_format)
    return results


def in_layout_of(feature: Tensor, merged: Tensor) -> Tensor:
    """A merged map in the layout of the feature that it was made from; itself where it has that layout."""
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
    """One level: ``gain * (block(feature) + resize(top))``, or ``block(feature)`` where there is no `top`."""
    if parameters is not None and _can_merge(feature, top, scale_factor):
        return functional.lateral_connection(feature, *parameters, top, mode=mode, gain=gain)
    lateral: Tensor = block(feature) if parameters is None else functional.lateral_connection(feature, *parameters)
    return lateral if top is None else add_top(lateral, top, mode=mode, gain=gain, scale_factor=scale_factor)


def add_top(
    lateral: Tensor, top: Tensor, *, mode: str = "nearest", gain: float = 1.0, scale_factor: int | None = None
) -> Tensor:
    """``gain * (lateral + resize(top))``, also of two dtypes and of sizes that `scale_factor` does not meet."""
    if not _fits(top, lateral, scale_factor):
        align_corners = False if mode == "bilinear" else None
        enlarged = F.interpolate(top, scale_factor=scale_factor, mode=mode, align_corners=align_corners)
        return gain * (lateral + enlarged)
    # A norm may return another dtype than the level above has (GroupNorm under autocast: float32); the sum of
    # two dtypes is eager PyTorch's.
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
