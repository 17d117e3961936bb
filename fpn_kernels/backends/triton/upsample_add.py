"""`upsample_add`: ``out = gain * (lateral + resize(top))`` in one pass, summed in float32 and rounded once.

Two walks over the result, chosen by its layout.  *channels* (NHWC): a program has some pixels of one image row and a
run of channels; *planes* (NCHW and the rest): some image rows, of one channel or of neighbouring ones, and a run of
columns.  Either way the index of the coarse pixel is computed once a row or column of the tile, never once an element,
and integers are divided once a program or once a row.

At ratio 2 (both sizes exactly doubled, any nearest mode) source is ``dst >> 1``, and a tile is one of *coarse* pixels:
each is loaded once and serves its four fine pixels.  Both fine and coarse loads are issued before the first use.
"""

# ruff: noqa: N803, N806 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, result_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import autotune, geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.device import (
    kernel,
    known_multiple,
    rounded,
    row_tile_of,
    rows_of,
    start_of,
    tile_of,
    widened,
)
from fpn_kernels.backends.triton.resized import resized_pixels, resized_rows

_RUN_TIME = [
    *("channels", "height", "width", "top_height", "top_width"),
    *("top_n", "top_c", "top_y", "top_x"),
    *("lateral_n", "lateral_c", "lateral_y", "lateral_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles"),
]


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Pixels or rows of a tile, channels or columns of it (coarse ones at ratio 2), and warps."""

    rows: int
    columns: int
    num_warps: int


# (walk, how the top is read, bytes of an element) -> tiles, the longest first.  One or two 16-byte accesses a thread of
# 128 to each tensor, so that with the coarse ones 32 KiB are in flight an SM at a quarter of its threads.
TABLE = {
    ("channels", "pairs", 2): (TileConfig(4, 256, 4), TileConfig(16, 64, 4), TileConfig(64, 16, 4)),
    ("channels", "pairs", 4): (TileConfig(8, 64, 4), TileConfig(32, 16, 4)),
    ("channels", "nearest", 2): (TileConfig(8, 256, 4), TileConfig(32, 64, 4), TileConfig(64, 16, 4)),
    ("channels", "nearest", 4): (TileConfig(16, 64, 4), TileConfig(64, 16, 4)),
    ("channels", "bilinear", 2): (TileConfig(4, 256, 4), TileConfig(16, 64, 4), TileConfig(64, 16, 4)),
    ("channels", "bilinear", 4): (TileConfig(8, 64, 4), TileConfig(32, 16, 4)),
    ("planes", "pairs", 2): (TileConfig(16, 32, 4),),
    ("planes", "pairs", 4): (TileConfig(16, 32, 4),),
    ("planes", "nearest", 2): (TileConfig(32, 64, 4),),
    ("planes", "nearest", 4): (TileConfig(16, 64, 4),),
    ("planes", "bilinear", 2): (TileConfig(16, 64, 4),),
    ("planes", "bilinear", 4): (TileConfig(16, 64, 4),),
}


def choose(walk: str, reading: str, element_size: int, columns: int, access: int) -> TileConfig:
    """The tile for rows of `columns` elements (channels, or columns as the tile counts them).

    `access` is how many elements the layouts allow to be moved at once, 0 for strided ones.
    """
    return fitting(TABLE[walk, reading, element_size], columns, access)


def fitting(tiles: tuple[TileConfig, ...], columns: int, access: int) -> TileConfig:
    """The longest tile of which at least three quarters would be used, else the shortest one.

    Element by element each access has an address of its own: twice the threads then, or registers run out.
    """
    filled = [tile for tile in tiles if 4 * columns >= 3 * tile.columns * -(-columns // tile.columns)]
    tile = filled[0] if filled else tiles[-1]
    return tile if access > 1 else dataclasses.replace(tile, num_warps=2 * tile.num_warps)


def walk_of(tensor: Tensor) -> str:
    """How to go over a tensor that is written (or a gradient that is read): along its channels or its planes."""
    return "channels" if tensor.shape[1] > 1 and tensor.stride(1) == 1 else "planes"


@kernel(_RUN_TIME)
def merge_channels(
    top, lateral, out, gain, scale_y, scale_x,
    channels, height, width, top_height, top_width,
    top_n, top_c, top_y, top_x,
    lateral_n, lateral_c, lateral_y, lateral_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    MODE: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
    TOP: tl.constexpr, LATERAL: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    row_tile = program % row_tiles
    program = program // row_tiles
    x = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    channels = known_multiple(known_multiple(known_multiple(channels, TOP), LATERAL), OUT)
    inside = (c < channels)[None, :]
    DTYPE: tl.constexpr = out.dtype.element_ty
    if PAIRS:
        y = program % top_height
        n = program // top_height
        inside = inside & (x < top_width)[:, None]
        top_start = start_of(top, n, y, top_n, top_y, TOP, WIDE)
        upper_lateral = start_of(lateral, n, 2 * y, lateral_n, lateral_y, LATERAL, WIDE)
        lower_lateral = start_of(lateral, n, 2 * y + 1, lateral_n, lateral_y, LATERAL, WIDE)
        upper_out = start_of(out, n, 2 * y, out_n, out_y, OUT, WIDE)
        lower_out = start_of(out, n, 2 * y + 1, out_n, out_y, OUT, WIDE)
        left = row_tile_of(2 * x, c, lateral_x, lateral_c, LATERAL, WIDE)
        right = row_tile_of(2 * x + 1, c, lateral_x, lateral_c, LATERAL, WIDE)
        coarse = tl.load(top_start + row_tile_of(x, c, top_x, top_c, TOP, WIDE), mask=inside)
        upper_left = tl.load(upper_lateral + left, mask=inside)
        upper_right = tl.load(upper_lateral + right, mask=inside)
        lower_left = tl.load(lower_lateral + left, mask=inside)
        lower_right = tl.load(lower_lateral + right, mask=inside)
        coarse = coarse.to(tl.float32)
        left = row_tile_of(2 * x, c, out_x, out_c, OUT, WIDE)
        right = row_tile_of(2 * x + 1, c, out_x, out_c, OUT, WIDE)
        tl.store(upper_out + left, rounded(gain * (upper_left.to(tl.float32) + coarse), DTYPE), mask=inside)
        tl.store(upper_out + right, rounded(gain * (upper_right.to(tl.float32) + coarse), DTYPE), mask=inside)
        tl.store(lower_out + left, rounded(gain * (lower_left.to(tl.float32) + coarse), DTYPE), mask=inside)
        tl.store(lower_out + right, rounded(gain * (lower_right.to(tl.float32) + coarse), DTYPE), mask=inside)
    else:
        y = program % height
        n = program // height
        inside = inside & (x < width)[:, None]
        lateral_start = start_of(lateral, n, y, lateral_n, lateral_y, LATERAL, WIDE)
        value = tl.load(lateral_start + row_tile_of(x, c, lateral_x, lateral_c, LATERAL, WIDE), mask=inside)
        coarse = resized_pixels(
            top, n, y, x, c, scale_y, scale_x, top_height, top_width, top_n, top_c, top_y, top_x,
            inside, MODE, TOP, WIDE,
        )  # fmt: skip
        result = rounded(gain * (value.to(tl.float32) + coarse), DTYPE)
        out_start = start_of(out, n, y, out_n, out_y, OUT, WIDE)
        tl.store(out_start + row_tile_of(x, c, out_x, out_c, OUT, WIDE), result, mask=inside)


@kernel(_RUN_TIME)
def merge_planes(
    top, lateral, out, gain, scale_y, scale_x,
    channels, height, width, top_height, top_width,
    top_n, top_c, top_y, top_x,
    lateral_n, lateral_c, lateral_y, lateral_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    MODE: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
    TOP: tl.constexpr, LATERAL: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program = program // column_tiles
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    n = program // row_tiles
    DTYPE: tl.constexpr = out.dtype.element_ty
    top_start = top + widened(n, WIDE) * known_multiple(top_n, TOP)
    lateral_start = lateral + widened(n, WIDE) * known_multiple(lateral_n, LATERAL)
    out_start = out + widened(n, WIDE) * known_multiple(out_n, OUT)
    width = known_multiple(known_multiple(width, LATERAL), OUT)
    if PAIRS:
        # Rows of all channels of the coarse map, one after another: a tile may span several small planes.
        c = row // top_height
        y = row - c * top_height
        rows_inside = (c < channels)[:, None]
        x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        fine_x = column_tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        coarse_inside = rows_inside & (x < known_multiple(top_width, TOP))[None, :]
        inside = rows_inside & (fine_x < width)[None, :]
        coarse_rows = rows_of(c, y, top_c, top_y, TOP, WIDE)
        upper_rows = rows_of(c, 2 * y, lateral_c, lateral_y, LATERAL, WIDE)
        lower_rows = rows_of(c, 2 * y + 1, lateral_c, lateral_y, LATERAL, WIDE)
        coarse = tl.load(top_start + tile_of(coarse_rows, x, top_x, TOP, WIDE), mask=coarse_inside)
        upper = tl.load(lateral_start + tile_of(upper_rows, fine_x, lateral_x, LATERAL, WIDE), mask=inside)
        lower = tl.load(lateral_start + tile_of(lower_rows, fine_x, lateral_x, LATERAL, WIDE), mask=inside)
        coarse = tl.interleave(coarse, coarse).to(tl.float32)
        upper = rounded(gain * (upper.to(tl.float32) + coarse), DTYPE)
        lower = rounded(gain * (lower.to(tl.float32) + coarse), DTYPE)
        upper_rows = rows_of(c, 2 * y, out_c, out_y, OUT, WIDE)
        lower_rows = rows_of(c, 2 * y + 1, out_c, out_y, OUT, WIDE)
        tl.store(out_start + tile_of(upper_rows, fine_x, out_x, OUT, WIDE), upper, mask=inside)
        tl.store(out_start + tile_of(lower_rows, fine_x, out_x, OUT, WIDE), lower, mask=inside)
    else:
        c = row // height
        y = row - c * height
        x = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = (c < channels)[:, None] & (x < width)[None, :]
        lateral_rows = rows_of(c, y, lateral_c, lateral_y, LATERAL, WIDE)
        value = tl.load(lateral_start + tile_of(lateral_rows, x, lateral_x, LATERAL, WIDE), mask=inside)
        coarse = resized_rows(
            top_start, c, y, x, scale_y, scale_x, top_height, top_width, top_c, top_y, top_x, inside, MODE, WIDE
        )
        result = rounded(gain * (value.to(tl.float32) + coarse), DTYPE)
        out_rows = rows_of(c, y, out_c, out_y, OUT, WIDE)
        tl.store(out_start + tile_of(out_rows, x, out_x, OUT, WIDE), result, mask=inside)


def reading_of(mode: str, top_size: tuple[int, int], size: tuple[int, int]) -> str:
    """How a tile reads the top: "pairs" at exactly twice the size, else as the mode says."""
    if mode == "bilinear":
        return "bilinear"
    return "pairs" if size == (2 * top_size[0], 2 * top_size[1]) else "nearest"


def plan(top: Tensor, lateral: Tensor, out: Tensor, mode: str, config: TileConfig | None = None) -> launching.Launch:
    """What writes ``gain * (lateral + resize(top))`` into `out`, which may be `lateral` itself; `config`: to measure.

    To be called with top, lateral, out and gain; of `out`, and of a `lateral` that is still to be written, shape and
    strides alone are read here.
    """
    batch, channels, height, width = lateral.shape
    top_height, top_width = top.shape[2:]
    walk = walk_of(out)
    reading = reading_of(mode, (top_height, top_width), (height, width))
    pairs = reading == "pairs"
    alignments: dict[str, int]
    if walk == "channels":
        launched, columns, outer = merge_channels, channels, batch * (top_height if pairs else height)
        rows = top_width if pairs else width
        alignments = {
            name: geometry.alignment(tensor, 1, channels)
            for name, tensor in (("TOP", top), ("LATERAL", lateral), ("OUT", out))
        }
    else:
        launched, outer = merge_planes, batch
        rows, columns = (channels * top_height, top_width) if pairs else (channels * height, width)
        alignments = {
            "TOP": geometry.alignment(top, 3, top_width) if pairs else 0,
            "LATERAL": geometry.alignment(lateral, 3, width),
            "OUT": geometry.alignment(out, 3, width),
        }
    # The planes gather from the top element by element in any case.
    access = min(a for name, a in alignments.items() if name != "TOP" or walk == "channels" or pairs)
    if config is None:
        config = choose(walk, reading, lateral.element_size(), columns, access)
        if autotune.ENABLED and access > 1:
            config = autotune.fastest(
                "upsample_add",
                (walk, reading, access, columns, *autotune.size_class(rows * outer)),
                top,
                TABLE[walk, reading, lateral.element_size()],
                config,
                lambda candidate: _try(candidate, top, lateral, out, mode),
            )
    row_tiles, column_tiles = -(-rows // config.rows), -(-columns // config.columns)
    return launching.Launch(
        launched,
        (row_tiles * column_tiles * outer,),
        (
            *(geometry.scale(top_height, height), geometry.scale(top_width, width)),
            *(channels, height, width, top_height, top_width),
            *geometry.strides(top),
            *geometry.strides(lateral),
            *geometry.strides(out),
            *(row_tiles, column_tiles),
        ),
        {
            "MODE": "nearest" if pairs else mode,
            "PAIRS": pairs,
            "WIDE": geometry.needs_int64(top, lateral, out),
            **alignments,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
            # The bilinear weights then have the same bits as in the backward, and as under the interpreter.
            "enable_fp_fusion": False,
        },
        top,
    )


def launch(top: Tensor, lateral: Tensor, out: Tensor, mode: str, gain: float, config: TileConfig | None = None) -> None:
    plan(top, lateral, out, mode, config)(top, lateral, out, gain)


def _try(config: TileConfig, top: Tensor, lateral: Tensor, out: Tensor, mode: str) -> None:
    """Launches a tile into a result that nothing reads."""
    result = torch.zeros_like(out, device=top.device)
    launch(top, result if lateral.is_meta else lateral, result, mode, 1.0, config)


@AtOnce
def upsample_add(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Callable[..., Tensor]:
    shape, out_format = lateral.shape, result_format(lateral)
    new = allocator(shape, out_format)
    merge = plan(top, lateral, launching.stand_in(shape, lateral, out_format), mode)

    def run(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Tensor:
        out = new(lateral)
        merge(top, lateral, out, gain)
        return out

    return run


def variants() -> Iterator[Variant]:
    """What `launch` may compile: every tile of the table on dense maps, and 16-bit ones on strided maps."""
    cases = [(key, tile, 16) for key, tiles in TABLE.items() for tile in tiles]
    cases += [(key, fitting(tiles, 256, 0), 0) for key, tiles in TABLE.items() if key[2] == 2]
    for (walk, reading, size), config, alignment in cases:
        pairs = reading == "pairs"
        yield variant(
            merge_channels if walk == "channels" else merge_planes,
            dict.fromkeys(("top", "lateral", "out"), POINTER_TYPES[size]),
            ("gain", "scale_y", "scale_x"),
            {
                **{"MODE": "nearest" if pairs else reading, "PAIRS": pairs, "WIDE": alignment == 0},
                # A gathered coarse map is read element by element in the planes.
                "TOP": alignment if walk == "channels" or pairs else 0,
                **{"LATERAL": alignment, "OUT": alignment},
                **{"ROWS": config.rows, "COLUMNS": config.columns},
            },
            {"num_warps": config.num_warps, "enable_fp_fusion": False},
            f"upsample_add-{walk}-{reading}-{8 * size}bit-{config.rows}x{config.columns}"
            f"-{'dense' if alignment else 'strided'}",
            aligned=alignment > 0,
            wide=(("STG",) if walk == "planes" else ("LDG", "STG")) if alignment else (),
        )
