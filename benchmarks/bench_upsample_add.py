"""upsample_add: lateral + resize(top), one merge of the top-down pathway without its convolution."""

from __future__ import annotations

from typing import Any

import torch

import fpn_kernels
from benchmarks.cases import TRAINING, Case
from benchmarks.harness import Harness
from benchmarks.workloads import Contender, Maker, Workload
from fpn_kernels import reference, roofline

OPERATOR = "upsample_add"


def workload(case: Case, device: torch.device) -> Workload:
    make, image, mode = Maker(case, device), case.spot.image, case.spot.mode
    assert case.spot.level is not None
    lateral = make.map(image.out_channels, *image.level(case.spot.level)[1:])
    top = make.map(image.out_channels, *image.level(case.spot.level + 1)[1:])
    shape, top_size = tuple(lateral.shape), tuple(top.shape[2:])
    cost = roofline.upsample_add(shape, top_size, make.dtype)
    if case.direction == TRAINING:
        cost += roofline.upsample_add_backward(shape, top_size, make.dtype)
    return Workload(
        inputs=(top, lateral),
        eager=Contender(lambda t, x: reference.upsample_add(t, x, mode=mode)),
        fused=Contender(lambda t, x: fpn_kernels.upsample_add(t, x, mode=mode)),
        cost=cost,
        exact=mode != "bilinear",
    )


def bench_upsample_add(case: Case, provider: Any, harness: Harness) -> None:
    harness.measure(case, provider, workload)
