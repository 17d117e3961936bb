"""weighted_merge: one node of a BiFPN, a map and a coarser one (top-down), or three of one size (bottom-up)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from benchmarks.cases import TOP_DOWN, TRAINING, Case
from benchmarks.harness import Harness
from benchmarks.workloads import Contender, Maker, Workload
from fpn_kernels import reference, roofline

OPERATOR = "weighted_merge"


def workload(case: Case, device: torch.device) -> Workload:
    make, image, mode = Maker(case, device), case.spot.image, case.spot.mode
    assert case.spot.level is not None
    size, coarse = (image.level(case.spot.level + step)[1:] for step in (0, 1))
    others = [coarse] if case.spot.node == TOP_DOWN else [size, size]
    maps = [make.map(image.out_channels, *place) for place in (size, *others)]
    shape = tuple(maps[0].shape)
    cost = roofline.weighted_merge(shape, others, make.dtype)
    if case.direction == TRAINING:
        cost += roofline.weighted_merge_backward(shape, others, make.dtype)

    def eager(*inputs: Tensor) -> Tensor:
        return reference.weighted_merge(inputs[:-1], inputs[-1], mode=mode)

    def fused(*inputs: Tensor) -> Tensor:
        return fpn_kernels.weighted_merge(inputs[:-1], inputs[-1], mode=mode)

    def wide(*inputs: Tensor) -> Tensor:
        return eager(*(tensor.float() for tensor in inputs)).to(make.dtype)

    weights = make.fusion_weights(len(maps))
    # In 16 bits eager rounds the factors, each product and each sum.
    work = Workload((*maps, weights), Contender(eager), Contender(fused), cost, wide=Contender(wide))
    # The gradient of the weights is a difference of sums of N C H W products of random numbers, over their own sum.
    work.differences = {len(maps): maps[0].numel() ** 0.5 / float(weights.detach().sum())}
    return work


def bench_weighted_merge(case: Case, provider: Any, harness: Harness) -> None:
    harness.measure(case, provider, workload)
