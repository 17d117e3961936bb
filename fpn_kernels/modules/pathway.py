"""A pyramid over the blocks that hold its parameters: the top-down pathway, and the output maps.

Every block that a fused call can stand in for is given to one; any other is called as the module it is, and its
result merged by `upsample_add`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels import functional
from fpn_kernels.backends.layouts import result_format
from fpn_kernels.modules.fusing import fused_parameters

GAINS = {"sum": 1.0, "avg": 0.5}

Parameters = tuple[Tensor, Tensor | None]
FindParameters = Callable[[nn.Module, int], Parameters | None]


def pyramid(
    features: Sequence[Tensor],
    inner_blocks: Sequence[nn.Module],
    output_blocks: Sequence[nn.Module],
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    scale_factor: int | None = None,
    find_parameters: FindParameters = fused_parameters,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """The merged maps, finest first, and the output maps of the finest levels, as many as there are output blocks.

    The merged maps lie in memory as the output convolutions read them fastest; `in_layout_of` takes one out in the
    caller's layout, which every output map has.  The other arguments are those of `merge_levels`.
    """
    # Found once: a parametrised weight is computed by the reading, and some (spectral norm) advance by it.
    outputs = [find_parameters(block, 3) for block in output_blocks]
    given = [parameters[0] for parameters in outputs if parameters is not None]
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *features))
    merged = merge_levels(
        features,
        inner_blocks,
        mode=mode,
        gain=gain,
        scale_factor=scale_factor,
        memory_format=(
            functional.output_conv_format(features[0], recorded=recorded) if given else torch.preserve_format
        ),
        find_parameters=find_parameters,
    )
    convolved = _output_maps(features, merged, outputs)
    # A block of someone else's may read the layout as well (by a view, say): it gets the caller's.
    return merged, [
        block(in_layout_of(feature, level)) if output is None else output
        for block, feature, level, output in zip(output_blocks, features, merged, convolved, strict=False)
    ]


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


def merge_levels(
    features: Sequence[Tensor],
    blocks: Sequence[nn.Module],
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    scale_factor: int | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    find_parameters: FindParameters = fused_parameters,
) -> Sequence[Tensor]:
    """The top-down pathway: the merged maps, finest first.

    Args:
        features: the backbone's maps, finest first.
        blocks: the lateral block of each level.
        mode: as in `fpn_kernels.upsample_add`.
        gain: factor on each merge.
        scale_factor: None where a map is resized to the size of the one it is added to; a number where it is
            enlarged by that, so that other sizes are the error (or the broadcast) of PyTorch's own sum.
        memory_format: layout of the merged maps, where all levels are one fused call; else they keep their features'.
        find_parameters: gives the weight and bias of a block, or None where it must run as a module.
    """
    parameters = [find_parameters(block, 1) for block in blocks]
    fused = [each for each in parameters if each is not None]
    if len(fused) == len(blocks) and all(
        _fits(top, feature, scale_factor) for feature, top in itertools.pairwise(features)
    ):
        weights, biases = zip(*fused, strict=True)
        return functional.top_down_pathway(features, weights, biases, mode=mode, gain=gain, memory_format=memory_format)
    merged: list[Tensor] = []
    for level in reversed(range(len(features))):
        top = merged[-1] if merged else None
        merged.append(
            merge_level(
                features[level], blocks[level], parameters[level], top, mode=mode, gain=gain, scale_factor=scale_factor
            )
        )
    return merged[::-1]


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
    cast = torch.is_autocast_enabled(feature.device.type)
    return (cast or top.dtype == feature.dtype) and _fits(top, feature, scale_factor)


def _fits(top: Tensor, lateral: Tensor, scale_factor: int | None) -> bool:
    """Whether `top`, enlarged by `scale_factor`, has the size of `lateral`."""
    if scale_factor is None:
        return True
    sizes = zip(top.shape[-2:], lateral.shape[-2:], strict=True)
    return all(coarse * scale_factor == fine for coarse, fine in sizes)
