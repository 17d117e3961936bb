"""The whole neck, C2..C5 to P2..P5: the module against the same network in plain PyTorch, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fpn_kernels
from benchmarks.cases import TRAINING, Case
from benchmarks.harness import Harness
from benchmarks.workloads import Contender, Maker, Workload, place
from fpn_kernels import reference, roofline

OPERATOR = "neck"


def _contender(module: nn.Module) -> Contender:
    def call(*features: Tensor) -> Any:
        return module({str(level): feature for level, feature in enumerate(features)})

    return Contender(call, tuple(module.parameters()))


def workload(case: Case, device: torch.device) -> Workload:
    make, image = Maker(case, device), case.spot.image
    features = tuple(make.map(*image.level(level)) for level in (2, 3, 4, 5))
    torch.manual_seed(2017)
    eager = reference.FeaturePyramidNetwork(image.channels, image.out_channels)
    fused = fpn_kernels.FeaturePyramidNetwork(image.channels, image.out_channels)
    fused.load_state_dict(eager.state_dict())
    cost = roofline.neck_forward_backward if case.direction == TRAINING else roofline.neck
    return Workload(
        inputs=features,
        eager=_contender(place(eager, case, device)),
        fused=_contender(place(fused, case, device)),
        cost=cost([feature.shape for feature in features], image.out_channels, make.dtype, pool=False),
        depth=len(features),
    )


def bench_neck(case: Case, provider: Any, harness: Harness) -> None:
    harness.measure(case, provider, workload)
