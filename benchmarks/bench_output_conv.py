"""output_conv: the 3x3 convolution of a merged map, and its bias; input and result in the same layout."""

from __future__ import annotations

from typing import Any

import torch

import fpn_kernels
from benchmarks.cases import TRAINING, Case
from benchmarks.harness import Harness
from benchmarks.workloads import Contender, Maker, Workload
from fpn_kernels import reference, roofline

OPERATOR = "output_conv"


def workload(case: Case, device: torch.device) -> Workload:
    make, image = Maker(case, device), case.spot.image
    assert case.spot.level is not None
    channels = image.out_channels
    feature = make.map(channels, *image.level(case.spot.level)[1:])
    cost = roofline.output_conv(feature.shape, channels, make.dtype)
    if case.direction == TRAINING:
        cost += roofline.output_conv_backward(feature.shape, channels, make.dtype)
    return Workload(
        inputs=(feature, make.weight(channels, channels, 3), make.bias(channels)),
        eager=Contender(reference.output_conv),
        fused=Contender(fpn_kernels.output_conv),
        cost=cost,
    )


def bench_output_conv(case: Case, provider: Any, harness: Harness) -> None:
    harness.measure(case, provider, workload)
