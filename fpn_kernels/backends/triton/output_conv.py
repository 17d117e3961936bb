"""`output_conv`: the FPN's 3x3 convolution (stride 1, padding 1) and its bias, of one map or of a whole pyramid.

An implicit matrix product over NHWC maps (`descriptor_kernels.py` says how): the nine taps are nine shifted reads of
the same box, so that no unfolded copy of the map exists anywhere, and the bias is added to the float32 sums on the way
out.  The levels of a pyramid, each with a weight of its own, share one launch: their tiles are numbered through, so
that the small levels fill what the last tiles of the large ones leave idle.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fpn_kernels.backends.layouts import allocate, requested_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import autotune, geometry, launching
from fpn_kernels.backends.triton.compiled import Variant
from fpn_kernels.backends.triton.descriptor_convolution import (
    MOST_SCATTERED,
    BoxConfig,
    Convolution,
    Level,
    boxed,
    convolve_variant,
    filling,
    fitting,
    pack_variant,
    plan,
    result_axis,
)

# (arithmetic, size of the tile) -> tile.  256 output channels by 128 pixels is 128 sums a thread: all of a pixel's
# channels, so that the map is read nine times and not eighteen (compiled for sm_90: 169 registers, 213,528 bytes).
TABLE = {
    ("half", "large"): BoxConfig(8, 16, 256, 64, 8, 3),
    ("half", "medium"): BoxConfig(8, 16, 128, 64, 8, 3),
    ("half", "small"): BoxConfig(8, 8, 64, 64, 4, 3, resident=3),
    ("tf32", "large"): BoxConfig(8, 16, 128, 32, 8, 3),
    ("tf32", "small"): BoxConfig(8, 8, 64, 32, 4, 3, resident=2),
    ("ieee", "large"): BoxConfig(4, 16, 64, 16, 4, 3, resident=2),
    ("ieee", "small"): BoxConfig(4, 8, 32, 16, 4, 3, resident=4),
}

# P2 to P5: the count of levels that is compiled ahead of time.
LEVELS_COMPILED = 4


def choose(
    arithmetic: str,
    batch: int,
    out_channels: int,
    sizes: Sequence[tuple[int, int]],
    processors: int,
    in_boxes: bool,
) -> BoxConfig:
    """The largest tile of which there are as many as multiprocessors, turned where fewer then cover the maps."""
    config = filling(fitting(TABLE, arithmetic, out_channels, in_boxes), batch, out_channels, sizes, processors)
    return min(config, config.turned, key=lambda tile: tile.tiles(batch, out_channels, sizes))


@AtOnce
def output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    memory_format: torch.memory_format | None,
) -> Callable[..., list[Tensor]]:
    """Prepares `output_conv` of every level in one launch (two, where weights are to be packed).

    The levels share batch, channels, dtype and having a bias or not; sizes and strides are each one's own.
    """
    batch, out_channels = features[0].shape[0], weights[0].shape[0]
    # A map of one pixel is NHWC and NCHW at once: the others decide.
    formats = {requested_format(feature, memory_format) for feature in features}
    out_format = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    shapes = [(batch, out_channels, *feature.shape[2:]) for feature in features]
    outs = [launching.stand_in(shape, features[0], out_format) for shape in shapes]
    sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
    arithmetic = geometry.arithmetic_of(features[0])
    config = choose(arithmetic, batch, out_channels, sizes, geometry.processors(features[0]), boxed(outs))

    def planned(config: BoxConfig) -> Convolution:
        levels = [Level(f, w, b, None, o) for f, w, b, o in zip(features, weights, biases, outs, strict=True)]
        return plan(levels, config, 9, arithmetic)

    def measured(config: BoxConfig) -> None:
        results = [torch.empty_like(out, device=features[0].device) for out in outs]
        planned(config)(features, weights, biases, results, None, 1.0)

    config = autotune.fastest(
        "output_conv",
        (arithmetic, result_axis(outs), boxed(outs), len(features), *weights[0].shape, *_size_classes(batch, sizes)),
        features[0],
        [tile for c in fitting(TABLE, arithmetic, out_channels, boxed(outs)) for tile in dict.fromkeys((c, c.turned))],
        config,
        measured,
    )
    convolve = planned(config)

    def run(
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        memory_format: torch.memory_format | None,
    ) -> list[Tensor]:
        results = [allocate(shape, features[0], out_format) for shape in shapes]
        convolve(features, weights, biases, results, None, 1.0)
        return results

    return run


def _size_classes(batch: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return autotune.size_class(batch, *itertools.chain(*sizes))


@AtOnce
def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> Callable[..., Tensor]:
    levels = output_conv_levels.prepare([feature], [weight], [bias], memory_format)

    def run(feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None) -> Tensor:
        return levels([feature], [weight], [bias], memory_format)[0]

    return run


def variants() -> Iterator[Variant]:
    """What a launch may compile: every tile in boxes of either layout and orientation, and element by element."""
    for (arithmetic, size), config in TABLE.items():
        tiles = [config] if config.turned == config else [config, config.turned]
        for tile, (layout, out) in itertools.product(tiles, (("nhwc", "channels"), ("nchw", "pixels"))):
            if arithmetic == "ieee" and tile != config:
                continue
            yield convolve_variant(tile, f"output_conv-{layout}", arithmetic=arithmetic, taps=9, out=out)
            if config.channels <= MOST_SCATTERED and tile == config:
                name = f"output_conv-{layout}-scattered"
                yield convolve_variant(tile, name, arithmetic=arithmetic, taps=9, out=out, boxed=False)
        if arithmetic != "ieee" or size == "large":
            name = f"output_conv-nhwc-{LEVELS_COMPILED}levels"
            yield convolve_variant(config, name, arithmetic=arithmetic, taps=9, levels=LEVELS_COMPILED)
    for arithmetic, levels in itertools.product(("half", "tf32", "ieee"), (1, LEVELS_COMPILED)):
        yield pack_variant(arithmetic, levels)
