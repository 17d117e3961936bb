"""`top_down_pathway` by Triton: the lateral connections of all levels, in overlapping launches.

A level needs the level above only in its epilogue, and the coarse levels leave most SMs idle (one image of 800 x 1280:
C5 is 16 large tiles, C4 is 64).  So the launches are chained by programmatic dependent launch (`launch.Link`): the
programs of a level take the SMs that the coarser levels leave, multiply, and wait for the level above before they read
its map and write their own.

    C5   |== product ==|= out
    C4      |=== product ===|... out          ... waits for the previous launch (indexing.grid_dependency_wait)
    C3         |====== product ======|.. out
    C2                |========= product =========| out

No program waits for a program that has not begun: a launch begins when every program of the previous one has.  So the
chain cannot deadlock on any number of SMs, and needs no flags in memory, no cooperative launch, and no reset between
the replays of a CUDA graph.

The first launch begins when all previous work has ended, and the last one lets no other launch begin early: to the work
around it, the chain is one launch.

Four levels of 800 x 1280 on an H100 in bfloat16: 63.5 us, one after another 74.1 us; eight images 418 and 433 us.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fpn_kernels.gpu import autotune, availability
from fpn_kernels.gpu.launch import Link, stand_in
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.lateral_connection import triton as lateral_connection
from fpn_kernels.operators.layouts import allocator
from fpn_kernels.operators.top_down_pathway.call import TopDownPathway


def _refusal(call: TopDownPathway) -> str | None:
    if call.mode == "bilinear":
        return "in bilinear mode a level is two launches"
    # Only the size of a top is checked, which is that of the next coarser feature.
    for level, connection in enumerate(call.connections([*call.features[1:], None])):
        reason = lateral_connection.refusal(connection)
        if reason is not None:
            return f"level {level}: {reason}"
    return availability.overlap_refusal(call.features[0])


def _plan(call: TopDownPathway) -> Callable[[TopDownPathway], list[Tensor]]:
    connections = call.connections([None] * len(call.features))
    coarsest = len(connections) - 1
    likes = [stand_in(each.shape(), each.feature, each.out_format()) for each in connections]
    allocators = [allocator(each.shape(), each.out_format()) for each in connections]
    launches = [
        lateral_connection.plan_connection(
            *(each.feature, each.matrix(), each.bias),
            *(None if level == coarsest else likes[level + 1], likes[level], call.mode),
            link=Link(follows=level < coarsest, leads=level > 0),
        )
        for level, each in enumerate(connections)
    ]

    def run(call: TopDownPathway) -> list[Tensor]:
        biases = call.placed()
        merged: list[Tensor] = []
        top: Tensor | None = None
        for level in range(coarsest, -1, -1):
            feature = call.features[level]
            out = allocators[level](feature)
            launches[level](feature, call.weights[level].flatten(1), biases[level], top, out, call.gain)
            merged.append(out)
            top = out
        return merged[::-1]

    return run


TOP_DOWN_PATHWAY = dispatch.Implementation(
    autotune.planned(_plan),
    _refusal,
    lambda call: availability.unmeasured(call.features[0]),
    optional=True,
)
