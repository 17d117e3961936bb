"""lateral_connection: conv1x1(feature) + bias + resize(top); the coarsest level has no top."""

from __future__ import annotations

from typing import Any

import torch

import fpn_kernels
from benchmarks.cases import TRAINING, Case
from benchmarks.harness import Harness
from benchmarks.workloads import Contender, Maker, Workload
from fpn_kernels import reference, roofline

OPERATOR = "lateral_connection"


def workload(case: Case, device: torch.device) -> Workload:
    make, image, mode = Maker(case, device), case.spot.image, case.spot.mode
    assert case.spot.level is not None
    channels, height, width = image.level(case.spot.level)
    feature = make.map(channels, height, width)
    inputs = [feature, make.weight(image.out_channels, channels), make.bias(image.out_channels)]
    top_size = None
    if case.spot.level < 5:
        top_size = image.level(case.spot.level + 1)[1:]
        inputs.append(make.map(image.out_channels, *top_size))
    cost = roofline.lateral_connection(feature.shape, image.out_channels, top_size, make.dtype)
    if case.direction == TRAINING:
        cost += roofline.lateral_connection_backward(feature.shape, image.out_channels, top_size, make.dtype)
    return Workload(
        inputs=tuple(inputs),
        eager=Contender(lambda *tensors: reference.lateral_connection(*tensors, mode=mode)),
        fused=Contender(lambda *tensors: fpn_kernels.lateral_connection(*tensors, mode=mode)),
        cost=cost,
    )


def bench_lateral_connection(case: Case, provider: Any, harness: Harness) -> None:
    harness.measure(case, provider, workload)
