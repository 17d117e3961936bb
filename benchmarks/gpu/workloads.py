"""The rows' workloads: those of the suite, the pathway, and all levels at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from benchmarks import (
    bench_lateral_connection,
    bench_neck,
    bench_output_conv,
    bench_upsample_add,
    bench_weighted_merge,
)
from benchmarks.cases import FORWARD, Case
from benchmarks.workloads import Contender, Maker, Workload, tensors
from fpn_kernels import functional, reference, roofline

# The coarsest level has nothing above it to be merged with.
_LEVELS = {"upsample_add": (2, 3, 4), "lateral_connection": (2, 3, 4, 5), "output_conv": (2, 3, 4, 5)}


def workload(case: Case, device: torch.device) -> Workload:
    """A case made concrete; one without a level is all of them in one call, one after the other where they need be."""
    levels = each_level(case)
    if levels == [case]:
        return _ONE[case.operator](case, device)
    work = _together([_ONE[case.operator](level, device) for level in levels])
    if case.operator == "output_conv":
        work.fused = Contender(_output_conv_levels)
    return work


def each_level(case: Case) -> list[Case]:
    """The cases of one level each that a case without a level stands for, where its operator has levels."""
    if case.spot.level is not None or case.operator not in _LEVELS:
        return [case]
    return [replace(case, spot=replace(case.spot, level=level)) for level in _LEVELS[case.operator]]


def _output_conv_levels(*inputs: Tensor) -> tuple[Tensor, ...]:
    """As the neck calls them: a feature, a weight and a bias a level."""
    return functional.output_conv_levels(inputs[0::3], inputs[1::3], inputs[2::3])


def _top_down_pathway(case: Case, device: torch.device) -> Workload:
    assert case.direction == FORWARD
    make, image = Maker(case, device), case.spot.image
    features = [make.map(*image.level(level)) for level in (2, 3, 4, 5)]
    weights = [make.weight(image.out_channels, channels) for channels in image.channels]
    biases = [make.bias(image.out_channels) for _ in image.channels]
    count = len(features)

    def of(pathway: Callable[..., Any]) -> Contender:
        return Contender(lambda *t: pathway(t[:count], t[count : 2 * count], t[2 * count :]))

    return Workload(
        inputs=(*features, *weights, *biases),
        eager=of(reference.top_down_pathway),
        fused=of(fpn_kernels.top_down_pathway),
        cost=roofline.top_down_pathway([feature.shape for feature in features], image.out_channels, make.dtype),
        depth=count,
    )


_ONE: dict[str, Callable[[Case, torch.device], Workload]] = {
    "upsample_add": bench_upsample_add.workload,
    "lateral_connection": bench_lateral_connection.workload,
    "output_conv": bench_output_conv.workload,
    "top_down_pathway": _top_down_pathway,
    "neck": bench_neck.workload,
    "weighted_merge": bench_weighted_merge.workload,
}


def _together(parts: Sequence[Workload]) -> Workload:
    """Several workloads as one: their inputs, calls and results one after the other, their costs added."""
    ends = [sum(len(part.inputs) for part in parts[: index + 1]) for index in range(len(parts))]
    starts = [0, *ends[:-1]]

    def of(calls: Sequence[Callable[..., Any]]) -> Contender:
        def call(*inputs: Tensor) -> list[Tensor]:
            results: list[Tensor] = []
            for one, start, end in zip(calls, starts, ends, strict=True):
                results += tensors(one(*inputs[start:end]))
            return results

        return Contender(call)

    return Workload(
        inputs=tuple(tensor for part in parts for tensor in part.inputs),
        eager=of([part.eager.call for part in parts]),
        fused=of([part.fused.call for part in parts]),
        cost=sum((part.cost for part in parts[1:]), start=parts[0].cost),
        exact=all(part.exact for part in parts),
    )
