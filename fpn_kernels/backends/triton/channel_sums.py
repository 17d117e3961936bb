"""`channel_sums`: the sum of each channel of a dense NHWC map, in two launches and always in one order.

Each program adds up a run of pixels, some rows of 16-byte accesses at a time, in float32; the second launch
(`merge_backward.sum_partials`) adds up what they leave, at most a few hundred sums a channel.
"""

# ruff: noqa: N803 - Triton's idiom: constexprs in capitals
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor

from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.device import kernel, known_multiple, loop_bound, widened
from fpn_kernels.backends.triton.merge_backward import reduction
from fpn_kernels.backends.triton.upsample_add import TileConfig, fitting

# Bytes of an element -> tiles of pixels by channels, the longest first: four 16-byte accesses a thread, so that 64 KiB
# are in flight a multiprocessor with four programs on it.
TABLE = {
    2: (TileConfig(16, 256, 4), TileConfig(64, 64, 4), TileConfig(256, 16, 4)),
    4: (TileConfig(32, 64, 4), TileConfig(128, 16, 4)),
}

# Programs a multiprocessor.
_RESIDENT = 4


@kernel(["pixels", "channels", "share"])
def sum_pixels(
    source, partials, pixels, channels, share,
    ACCESS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channels = known_multiple(channels, ACCESS)
    inside = c < channels
    first = program * share
    end = tl.minimum(first + share, pixels)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for pixel in range(loop_bound(first), loop_bound(end), ROWS):
        row = pixel + tl.arange(0, ROWS)
        place = widened(row, WIDE)[:, None] * channels + c[None, :]
        total += tl.load(source + place, mask=(row < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(partials + program.to(tl.int64) * channels + c, tl.sum(total, axis=0), mask=inside)


@AtOnce
def channel_sums(source: Tensor) -> Callable[..., Tensor]:
    """Prepares the sums of a map that is contiguous in channels_last."""
    batch, channels, height, width = source.shape
    pixels, access = batch * height * width, geometry.alignment(source, 1, channels)
    config = fitting(TABLE[source.element_size()], channels, access)
    column_tiles = -(-channels // config.columns)
    most = max(1, _RESIDENT * geometry.processors(source) // column_tiles)
    # A whole number of tiles each; the last program may have less, and none has nothing.
    share = -(-pixels // (most * config.rows)) * config.rows
    programs = -(-pixels // share)
    add_up = launching.Launch(
        sum_pixels,
        (programs, column_tiles),
        (pixels, channels, share),
        {
            "ACCESS": access,
            "WIDE": geometry.needs_int64(source),
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
        },
        source,
    )
    reduce = reduction(source, programs)

    def run(source: Tensor) -> Tensor:
        partials = torch.empty((programs, channels), dtype=torch.float32, device=source.device)
        result = source.new_empty(channels)
        add_up(source, partials)
        reduce(partials, result, 1.0)
        return result

    return run


def variants() -> Iterator[Variant]:
    for size, tiles in TABLE.items():
        for config in tiles:
            yield variant(
                sum_pixels,
                {"source": POINTER_TYPES[size], "partials": "*fp32"},
                (),
                {"ACCESS": 16, "WIDE": False, "ROWS": config.rows, "COLUMNS": config.columns},
                {"num_warps": config.num_warps},
                f"channel_sums-{8 * size}bit-{config.rows}x{config.columns}-dense",
                aligned=True,
                wide=("LDG",),
            )
