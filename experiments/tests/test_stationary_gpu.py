"""`experiments.stationary` against float64, on a GPU of compute capability 9.0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import check, filled, random_map, random_weight
from stationary_calls import TILES, alone, connect, make_call
from torch import Tensor

from experiments.stationary import launch as stationary
from experiments.stationary.launch import StationaryConfig
from fpn_kernels.gpu.launch import Link
from fpn_kernels.operators.lateral_connection.triton import plan_connection

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("config", "feature", "layout", "has_top"), TILES, ids=str)
def test_on_a_gpu(config: StationaryConfig, feature: str, layout: str, has_top: bool) -> None:
    """Tails along every axis and the size of C2; the same bits each time, and from a captured graph."""
    for height, width in ((10, 24), (200, 320)):
        sizes = {"out_channels": 2 * config.channels, "height": height, "width": width}
        call = make_call(config, "cuda", (feature, layout), **sizes, **({} if has_top else {"top": None}))
        first = connect(config, call, 0.7 if has_top else 1.0, layout)
        for _ in range(20):
            assert torch.equal(connect(config, call, 0.7 if has_top else 1.0, layout), first)
        connect(config, alone(call), layout=layout)
    captured, graph = filled(float("nan"), call["feature"], 2 * config.channels, layout), torch.cuda.CUDAGraph()
    run = stationary.plan(config, **call, out=captured)
    run(**call, out=captured, gain=1.0)  # compiled before the capture
    with torch.cuda.graph(graph):
        kept = run(**call, out=captured, gain=1.0)
    captured.fill_(float("nan"))
    graph.replay()
    check(captured, call, "nearest", 1.0)
    del kept


def test_a_pathway_on_a_gpu() -> None:
    """Launches overlap; the kernel that serves computes the coarsest level, this one the other levels."""
    levels = [((200, 320), 256), ((100, 160), 512), ((50, 80), 1024), ((25, 40), 2048)]
    calls = [
        {
            "feature": random_map((1, channels, *size), torch.bfloat16).cuda(),
            "weight": random_weight(256, channels, torch.bfloat16).cuda(),
            "bias": torch.randn(256).bfloat16().cuda(),
        }
        for size, channels in levels
    ]
    first: list[Tensor] = []
    for _ in range(30):
        merged: list[Tensor] = []
        kept: list[Any] = []
        for level in (3, 2, 1, 0):
            call = {**calls[level], "top": merged[-1] if merged else None}
            out, link = filled(float("nan"), call["feature"], 256), Link(follows=level < 3, leads=level > 0)
            fitting = stationary.candidates(**call, out=out)
            assert bool(fitting) == (level < 3)
            if fitting:
                kept.append(stationary.plan(fitting[0], **call, out=out, link=link)(**call, out=out, gain=1.0))
            else:
                plan_connection(**call, out=out, mode="nearest", link=link)(*call.values(), out, 1.0)
            merged.append(out)
        first = first or merged
        assert all(map(torch.equal, merged, first))
    for level, out, top in zip((3, 2, 1, 0), first, [None, *first[:3]], strict=True):
        check(out, {**calls[level], "top": top}, "nearest", 1.0)
