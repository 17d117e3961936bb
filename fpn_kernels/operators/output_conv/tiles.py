"""The tiles of the 3x3 convolution in Triton: the table, and which tile and which launches serve a pyramid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fpn_kernels.gpu.launch import Link


@dataclasses.dataclass(frozen=True)
class BoxConfig:
    """A tile of the result: a box of pixels by output channels, and how it is run.

    Attributes:
        rows, columns: the box of pixels; at least 16 bytes along either axis.
        channels: output channels of a tile.
        depth: input channels per step of the sum.
        num_warps, num_stages: as in Triton.
        ctas_per_sm: programs per SM.
    """

    rows: int
    columns: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1

    @property
    def transposed(self) -> BoxConfig:
        """The same tile with rows and columns of the box swapped."""
        return dataclasses.replace(self, rows=self.columns, columns=self.rows)

    def tiles(self, batch: int, out_channels: int, sizes: Sequence[tuple[int, int]]) -> int:
        """How many tiles cover maps of these sizes."""
        boxes = sum(-(-height // self.rows) * -(-width // self.columns) for height, width in sizes)
        return batch * boxes * -(-out_channels // self.channels)

    def constexprs(self) -> dict[str, Any]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "CHANNELS": self.channels, "DEPTH": self.depth}

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.channels}x{self.depth}"


# The most channels of a tile that is written element by element, each by an address of its own: more of them spill
# (compiled for sm_100 at 256 channels: 171 instructions to and from local memory).
MAX_SCATTERED = 128


def fitting(
    table: Mapping[tuple[str, str], BoxConfig], arithmetic: str, out_channels: int, in_boxes: bool
) -> list[BoxConfig]:
    """The tiles of a table that fit a call, largest first; `in_boxes`: results are written through descriptors."""
    configs = [config for (kind, _), config in table.items() if kind == arithmetic]
    fit = [c for c in configs if out_channels > c.channels // 2 and (in_boxes or c.channels <= MAX_SCATTERED)]
    return fit or configs[-1:]


def filling(
    fit: Sequence[BoxConfig], batch: int, out_channels: int, sizes: Sequence[tuple[int, int]], sms: int
) -> BoxConfig:
    """The largest of the tiles that fit of which there are as many as SMs, or the smallest."""
    return next((config for config in fit if config.tiles(batch, out_channels, sizes) >= sms), fit[-1])


# (arithmetic, size of the tile) -> tile.  256 pixels by 128 output channels are 128 accumulators per thread, and
# the product in steps of 64 x 256 x 16, which read least from shared memory.  (256 channels by 128 pixels took 118 us
# on an H100 at 200 x 320, where this one takes 109; compiled for sm_90: 169 registers and 213,528 bytes.)
TABLE = {
    ("half", "large"): BoxConfig(16, 16, 128, 64, 8, 3),
    ("half", "wide"): BoxConfig(8, 32, 128, 64, 8, 3),
    ("half", "medium"): BoxConfig(8, 16, 128, 64, 4, 4),
    ("half", "short"): BoxConfig(8, 8, 128, 64, 4, 4),
    ("half", "small"): BoxConfig(8, 8, 64, 64, 4, 3, ctas_per_sm=3),
    ("tf32", "large"): BoxConfig(8, 16, 128, 32, 8, 3),
    ("tf32", "small"): BoxConfig(8, 8, 64, 32, 4, 3, ctas_per_sm=2),
    ("ieee", "large"): BoxConfig(4, 16, 64, 16, 4, 3, ctas_per_sm=2),
    ("ieee", "small"): BoxConfig(4, 8, 32, 16, 4, 3, ctas_per_sm=4),
}

# The most input channels per step where descriptors are lowered to pointers, which take registers: with 64, four of the
# tiles spilled 16 to 32 bytes (compiled for sm_80: four levels in a launch, and results written one by one).
_DEPTH_BY_POINTERS = 32

# The time of one wave of a tile (as many programs as run at a time) in us on an H100, 256 to 256 channels in bfloat16:
# the time of 200 x 320 pixels, one image and eight, less 4 us of the launch and its measurement, divided by the number
# of waves.  Only the ratios matter.
WAVES = {"large": 25.5, "wide": 26.9, "medium": 13.8, "short": 9.5, "small": 16.7}

# A level whose tiles fill this share of the chip has a launch of its own.
_FILLS = 0.75


def choose(
    arithmetic: str,
    batch: int,
    out_channels: int,
    sizes: Sequence[tuple[int, int]],
    sms: int,
    in_boxes: bool,
) -> BoxConfig:
    """The tile, in either orientation, whose waves take the shortest time.

    Where waves were not measured: the largest tile of which there are as many as SMs, transposed where fewer then cover
    the maps.
    """
    fit = fitting(TABLE, arithmetic, out_channels, in_boxes)
    times = {config: WAVES[size] for (kind, size), config in TABLE.items() if kind == arithmetic == "half"}
    if not times:
        config = filling(fit, batch, out_channels, sizes, sms)
        return min(config, config.transposed, key=lambda tile: tile.tiles(batch, out_channels, sizes))

    def time(tile: BoxConfig) -> float:
        waves = -(-tile.tiles(batch, out_channels, sizes) // (sms * tile.ctas_per_sm))
        return waves * (times[tile] if tile in times else times[tile.transposed])

    return min((tile for config in fit for tile in (config, config.transposed)), key=time)


def on_chip(config: BoxConfig, copies_in_bulk: bool) -> BoxConfig:
    """The tile as a chip with or without bulk copies runs it."""
    return config if copies_in_bulk else dataclasses.replace(config, depth=min(config.depth, _DEPTH_BY_POINTERS))


def launches(
    arithmetic: str,
    batch: int,
    out_channels: int,
    sizes: Sequence[tuple[int, int]],
    sms: int,
    in_boxes: bool,
) -> list[tuple[tuple[int, ...], BoxConfig]]:
    """The launches in their order: the levels of each, and its tile.

    A level that fills the chip has a launch of its own, and all others share one: 168 us for 800 x 1280 on an H100 in
    bfloat16, where one launch of all four levels took 183 us at best.  In float32, not measured: one launch.
    """
    alone: list[tuple[tuple[int, ...], BoxConfig]] = []
    together: list[int] = []
    for level, size in enumerate(sizes):
        config = choose(arithmetic, batch, out_channels, [size], sms, in_boxes)
        if arithmetic == "half" and config.tiles(batch, out_channels, [size]) >= _FILLS * sms * config.ctas_per_sm:
            alone.append(((level,), config))
        else:
            together.append(level)
    if together:
        config = choose(arithmetic, batch, out_channels, [sizes[level] for level in together], sms, in_boxes)
        alone.append((tuple(together), config))
    return alone


def links_of(count: int) -> list[Link]:
    """The links of `count` launches, each of which begins while the previous one runs."""
    return [Link(follows=place > 0, leads=place < count - 1) for place in range(count)]
