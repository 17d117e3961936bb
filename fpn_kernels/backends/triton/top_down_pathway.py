"""`top_down_pathway`: the lateral connections of all levels, each launched while the one before it still runs.

A level needs the one above it only for its epilogue, and the coarse levels leave most multiprocessors idle (one image
of 800 x 1280: C5 is 16 large tiles, C4 is 64).  So the launches are chained by programmatic dependent launch
(`launching.Link`): a level's programs take the multiprocessors that the coarser ones leave, multiply, and wait for
the level above before they read its map and write their own.

    C5   |== product ==|= out
    C4      |=== product ===|... out          ... waits for the launch before it (device.await_previous)
    C3         |====== product ======|.. out
    C2                |========= product =========| out

No program waits for one that has not begun: a launch begins when every program of the one before it has.  So nothing
can stand still, however few multiprocessors there are, and there are no flags in memory, no cooperative launch, and
nothing to reset between the replays of a CUDA graph.

The first launch begins as any does, when all that was launched before it has ended, and the last lets none begin early:
for the work around it the whole is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, requested_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import lateral_connection, lateral_connection_descriptors, launching
from fpn_kernels.backends.triton.compiled import Variant
from fpn_kernels.backends.triton.descriptor_convolution import convolve_variant


@AtOnce
def top_down_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> Callable[..., list[Tensor]]:
    """Prepares the pathway: finest level first, weights ``[Cout, Cin]``; `mode` is a nearest one."""
    coarsest = len(features) - 1
    shapes = [(f.shape[0], w.shape[0], *f.shape[2:]) for f, w in zip(features, weights, strict=True)]
    formats = [requested_format(feature, memory_format) for feature in features]
    likes = [launching.stand_in(*made) for made in zip(shapes, features, formats, strict=True)]
    allocators = [allocator(shape, chosen) for shape, chosen in zip(shapes, formats, strict=True)]
    connections = [
        lateral_connection.plan(
            *(features[level], weights[level], biases[level]),
            *(None if level == coarsest else likes[level + 1], likes[level], mode),
            link=launching.Link(follows=level < coarsest, leads=level > 0),
        )
        for level in range(len(features))
    ]

    def run(
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        mode: str,
        gain: float,
        memory_format: torch.memory_format | None,
    ) -> list[Tensor]:
        merged: list[Tensor] = []
        in_use: list[Sequence[Tensor]] = []
        top: Tensor | None = None
        for level in range(coarsest, -1, -1):
            out = allocators[level](features[level])
            in_use.append(connections[level](features[level], weights[level], biases[level], top, out, gain))
            merged.append(out)
            top = out
        return merged[::-1]

    return run


# Coarsest level, those between, finest level.
_LINKS = {
    "first": launching.Link(leads=True),
    "middle": launching.Link(follows=True, leads=True),
    "last": launching.Link(follows=True),
}


def variants() -> Iterator[Variant]:
    """The tiles that a pathway of the paper's widths takes, at each place of the chain."""
    for place, link in _LINKS.items():
        for arithmetic, size, layout in (
            *(("half", "large", "nhwc"), ("half", "large", "nchw"), ("half", "small", "nhwc")),
            *(("tf32", "large", "nhwc"), ("ieee", "small", "nchw")),
        ):
            name = f"top_down_pathway-{place}"
            if link.follows:
                yield lateral_connection.connect_variant(arithmetic, size, layout, name, link)
            elif layout == "nhwc" and arithmetic != "ieee":
                yield lateral_connection.connect_variant(arithmetic, size, "nhwc-alone", name, link)
        for size, axis in (("large", "channels"), ("large", "pixels"), ("medium", "channels"), ("small", "channels")):
            name = f"top_down_pathway-{place}-descriptors-{axis}"
            config, top = lateral_connection_descriptors.TABLE["half", size], axis if link.follows else None
            yield convolve_variant(config, name, arithmetic="half", taps=1, feature=axis, top=top, out=axis, link=link)
