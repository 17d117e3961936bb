"""`output_conv`: the FPN's 3x3 convolution (stride 1, padding 1) and its bias, of one map or of a whole pyramid.

An implicit matrix product over NHWC maps (`descriptor_kernels.py` says how): the nine taps are nine shifted reads of
the same box, so that no unfolded copy of the map exists anywhere, and the bias is added to the float32 sums on the way
out.

The levels of a pyramid, each with a weight of its own: one that fills the chip has a launch of its own, with the tile
that is fastest for it; the small ones share a launch, their tiles numbered through.  The launches overlap
(`launching.Link`): what the last tiles of one leave idle the first of the next take.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, requested_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import autotune, eligibility, geometry, launching
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
    plan_matrices,
    result_axis,
)

# (arithmetic, size of the tile) -> tile.  256 pixels by 128 output channels is 128 sums a thread, and the product in
# steps of 64 x 256 x 16, which ask least of shared memory.  (256 channels by 128 pixels, measured on an H100 at
# 200 x 320: 118 us, where this one takes 109; compiled for sm_90: 169 registers and 213,528 bytes.)
TABLE = {
    ("half", "large"): BoxConfig(16, 16, 128, 64, 8, 3),
    ("half", "wide"): BoxConfig(8, 32, 128, 64, 8, 3),
    ("half", "medium"): BoxConfig(8, 16, 128, 64, 4, 4),
    ("half", "short"): BoxConfig(8, 8, 128, 64, 4, 4),
    ("half", "small"): BoxConfig(8, 8, 64, 64, 4, 3, resident=3),
    ("tf32", "large"): BoxConfig(8, 16, 128, 32, 8, 3),
    ("tf32", "small"): BoxConfig(8, 8, 64, 32, 4, 3, resident=2),
    ("ieee", "large"): BoxConfig(4, 16, 64, 16, 4, 3, resident=2),
    ("ieee", "small"): BoxConfig(4, 8, 32, 16, 4, 3, resident=4),
}

# Input channels a step, at most, where a descriptor is lowered to pointers, which take registers: with 64, four of the
# tiles spilled 16 to 32 bytes (compiled for sm_80: four levels in a launch, and results written one by one).
_DEPTH_BY_POINTERS = 32

# What a wave of a tile (as many programs as are resident) takes, in us on an H100, 256 to 256 channels in bfloat16: the
# time of 200 x 320 pixels, one image and eight, less 4 of the launch and its measurement, over the number of waves.  It
# is the ratios that count.
WAVES = {"large": 25.5, "wide": 26.9, "medium": 13.8, "short": 9.5, "small": 16.7}

# A launch of its own is for a level with tiles for so much of the chip.
_FILLS = 0.75

# Compiled ahead of time: any count of levels in a launch, and the launches of P2 to P5 of 800 x 1280 on an H100.
LEVELS_COMPILED = 4
_PYRAMID, _PROCESSORS = ((200, 320), (100, 160), (50, 80), (25, 40)), 132


def choose(
    arithmetic: str,
    batch: int,
    out_channels: int,
    sizes: Sequence[tuple[int, int]],
    processors: int,
    in_boxes: bool,
) -> BoxConfig:
    """The tile, in either orientation, whose waves take the shortest.

    Where nobody has measured them, the largest tile of which there are as many as multiprocessors, turned where fewer
    then cover the maps.
    """
    fit = fitting(TABLE, arithmetic, out_channels, in_boxes)
    times = {config: WAVES[size] for (kind, size), config in TABLE.items() if kind == arithmetic == "half"}
    if not times:
        config = filling(fit, batch, out_channels, sizes, processors)
        return min(config, config.turned, key=lambda tile: tile.tiles(batch, out_channels, sizes))

    def time(tile: BoxConfig) -> float:
        waves = -(-tile.tiles(batch, out_channels, sizes) // (processors * tile.resident))
        return waves * (times[tile] if tile in times else times[tile.turned])

    return min((tile for config in fit for tile in (config, config.turned)), key=time)


def on_chip(config: BoxConfig, copies_in_bulk: bool) -> BoxConfig:
    """The tile as a chip runs it that has bulk copies, or has them not."""
    return config if copies_in_bulk else dataclasses.replace(config, depth=min(config.depth, _DEPTH_BY_POINTERS))


def launches(
    arithmetic: str,
    batch: int,
    out_channels: int,
    sizes: Sequence[tuple[int, int]],
    processors: int,
    in_boxes: bool,
) -> list[tuple[tuple[int, ...], BoxConfig]]:
    """Which levels share a launch, and its tile, in the order of the launches.

    A level that fills the chip has one of its own, and all others have one together: 800 x 1280 on an H100 in bfloat16
    168 us, where one launch of all four took 183 at best.  In float32 nobody has measured it: one launch.
    """
    alone: list[tuple[tuple[int, ...], BoxConfig]] = []
    together: list[int] = []
    for level, size in enumerate(sizes):
        config = choose(arithmetic, batch, out_channels, [size], processors, in_boxes)
        if arithmetic == "half" and config.tiles(batch, out_channels, [size]) >= _FILLS * processors * config.resident:
            alone.append(((level,), config))
        else:
            together.append(level)
    if together:
        config = choose(arithmetic, batch, out_channels, _of(sizes, together), processors, in_boxes)
        alone.append((tuple(together), config))
    return alone


def _links(count: int) -> list[launching.Link]:
    """Those of so many launches, each of which begins while the one before it runs."""
    return [launching.Link(follows=place > 0, leads=place < count - 1) for place in range(count)]


@AtOnce
def output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    memory_format: torch.memory_format | None,
) -> Callable[..., list[Tensor]]:
    """Prepares `output_conv` of every level, in `launches`, and one before them where weights are to be packed.

    The levels share batch, channels, dtype and having a bias or not; sizes and strides are each one's own.
    """
    batch, out_channels = features[0].shape[0], weights[0].shape[0]
    # A map of one pixel is NHWC and NCHW at once: the others decide.
    formats = {requested_format(feature, memory_format) for feature in features}
    out_format = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    shapes = [(batch, out_channels, *feature.shape[2:]) for feature in features]
    outs = [launching.stand_in(shape, features[0], out_format) for shape in shapes]
    allocators = [allocator(shape, out_format) for shape in shapes]
    sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
    arithmetic, processors = geometry.arithmetic_of(features[0]), geometry.processors(features[0])
    in_bulk = eligibility.copies_in_bulk(features[0])
    groups = [
        (group, on_chip(config, in_bulk))
        for group, config in launches(arithmetic, batch, out_channels, sizes, processors, boxed(outs))
    ]
    overlap = eligibility.overlap_refusal(features[0]) is None
    links = _links(len(groups)) if overlap else [launching.ALONE] * len(groups)
    # All weights at once, before the first of them: a launch between two others would keep them from overlapping.
    to_matrices, columns, _ = plan_matrices(weights, arithmetic, groups[0][1].depth)
    convolutions: list[tuple[tuple[int, ...], Convolution]] = []
    for (group, config), link in zip(groups, links, strict=True):
        levels = [Level(features[n], weights[n], biases[n], None, outs[n]) for n in group]
        tile = _measured(levels, arithmetic, config) if autotune.ENABLED else config
        convolutions.append((group, plan(levels, tile, 9, arithmetic, link=link, columns=columns)))

    def run(
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        memory_format: torch.memory_format | None,
    ) -> list[Tensor]:
        results = [new(features[0]) for new in allocators]
        matrices = to_matrices(weights)
        in_use: list[Sequence[Tensor]] = []
        for group, convolve in convolutions:
            parts = (_of(features, group), _of(matrices, group), _of(biases, group), _of(results, group))
            in_use.append(convolve(*parts, None, 1.0))
        return results

    return run


def _of(values: Sequence[Any], group: Sequence[int]) -> list[Any]:
    return [values[level] for level in group]


def _measured(levels: Sequence[Level], arithmetic: str, config: BoxConfig) -> BoxConfig:
    """The fastest tile for levels that share a launch, alone on the chip; `config` where nothing can be measured."""
    features, outs = [level.feature for level in levels], [level.out for level in levels]
    sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
    in_boxes, weight = boxed(outs), levels[0].weight
    fit = fitting(TABLE, arithmetic, weight.shape[0], in_boxes)
    in_bulk = eligibility.copies_in_bulk(features[0])

    def launch(candidate: BoxConfig) -> None:
        results = [torch.empty_like(out, device=features[0].device) for out in outs]
        convolve = plan(levels, candidate, 9, arithmetic)
        convolve(features, [level.weight for level in levels], [level.bias for level in levels], results, None, 1.0)

    return autotune.fastest(
        "output_conv",
        (arithmetic, result_axis(outs), in_boxes, len(levels), *weight.shape, *_size_classes(len(outs[0]), sizes)),
        features[0],
        [on_chip(tile, in_bulk) for c in fit for tile in dict.fromkeys((c, c.turned))],
        config,
        launch,
    )


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


def _tiles_of_chips() -> Iterator[tuple[str, str, BoxConfig, tuple[int, ...]]]:
    """Arithmetic, size and tile, and the chips (as `Variant.capabilities`) that have it."""
    for (arithmetic, size), config in TABLE.items():
        other = on_chip(config, copies_in_bulk=False)
        if other == config:
            yield arithmetic, size, config, ()
        else:
            yield arithmetic, size, config, (90, 100)
            yield arithmetic, size, other, (80,)


def variants() -> Iterator[Variant]:
    """What a launch may compile: every tile in boxes of either layout and orientation, and element by element."""
    for arithmetic, size, config, capabilities in _tiles_of_chips():
        tiles = [config] if config.turned == config else [config, config.turned]
        only: dict[str, Any] = {"arithmetic": arithmetic, "taps": 9, "capabilities": capabilities}
        for tile, (layout, out) in itertools.product(tiles, (("nhwc", "channels"), ("nchw", "pixels"))):
            if arithmetic == "ieee" and tile != config:
                continue
            yield convolve_variant(tile, f"output_conv-{layout}", out=out, **only)
            if config.channels <= MOST_SCATTERED and tile == config:
                name = f"output_conv-{layout}-scattered"
                yield convolve_variant(tile, name, out=out, boxed=False, **only)
        if arithmetic != "ieee" or size == "large":
            name = f"output_conv-nhwc-{LEVELS_COMPILED}levels"
            yield convolve_variant(config, name, levels=LEVELS_COMPILED, **only)
    pyramid = launches("half", 1, 256, _PYRAMID, _PROCESSORS, True)
    for (group, config), link in zip(pyramid, _links(len(pyramid)), strict=True):
        name = f"output_conv-nhwc-pyramid-{''.join(map(str, group))}"
        yield convolve_variant(config, name, arithmetic="half", taps=9, levels=len(group), link=link)
    for arithmetic, levels in itertools.product(("half", "tf32", "ieee"), (1, LEVELS_COMPILED)):
        yield pack_variant(arithmetic, levels)
