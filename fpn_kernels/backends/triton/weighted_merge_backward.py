"""`weighted_merge_backward`: ``factor * grad`` and the sum of ``grad * input``, in one pass over both.

No atomics: each program leaves the float32 sum of its tile, and one reduction adds these up in a fixed order.
"""

# ruff: noqa: N803 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, result_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.device import kernel, known_multiple, rounded, rows_of, tile_of, widened
from fpn_kernels.backends.triton.upsample_add import TileConfig, fitting, walk_of

_RUN_TIME = [
    *("channels", "height", "width"),
    *("grad_n", "grad_c", "grad_y", "grad_x"),
    *("input_n", "input_c", "input_y", "input_x"),
    *("out_n", "out_c", "out_y", "out_x"),
    *("row_tiles", "column_tiles"),
]

# (walk, bytes of an element) -> tiles, the longest first: two 16-byte accesses a thread of 128 to each tensor.
TABLE = {
    ("channels", 2): (TileConfig(8, 256, 4), TileConfig(32, 64, 4)),
    ("channels", 4): (TileConfig(16, 64, 4),),
    ("planes", 2): (TileConfig(32, 64, 4),),
    ("planes", 4): (TileConfig(16, 64, 4),),
}


def choose(walk: str, element_size: int, columns: int, access: int) -> TileConfig:
    """The tile for rows of `columns` elements; `access` as for `upsample_add`."""
    return fitting(TABLE[walk, element_size], columns, access)


@kernel(_RUN_TIME)
def scale_and_sum(
    grad, input, factor, out, partials,
    channels, height, width,
    grad_n, grad_c, grad_y, grad_x,
    input_n, input_c, input_y, input_x,
    out_n, out_c, out_y, out_x,
    row_tiles, column_tiles,
    WALK: tl.constexpr, WIDE: tl.constexpr,
    GRAD: tl.constexpr, INPUT: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row = (program // column_tiles % row_tiles) * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    n = program // column_tiles // row_tiles
    grad = grad + widened(n, WIDE) * known_multiple(grad_n, GRAD)
    input = input + widened(n, WIDE) * known_multiple(input_n, INPUT)
    out = out + widened(n, WIDE) * known_multiple(out_n, OUT)
    # A row is a pixel with its channels, or a row of a plane with its columns.
    if WALK == "channels":
        channels = known_multiple(known_multiple(known_multiple(channels, GRAD), INPUT), OUT)
        y = row // width
        x = row - y * width
        inside = (y < height)[:, None] & (column < channels)[None, :]
        grad_tile = tile_of(rows_of(y, x, grad_y, grad_x, GRAD, WIDE), column, grad_c, GRAD, WIDE)
        input_tile = tile_of(rows_of(y, x, input_y, input_x, INPUT, WIDE), column, input_c, INPUT, WIDE)
        out_tile = tile_of(rows_of(y, x, out_y, out_x, OUT, WIDE), column, out_c, OUT, WIDE)
    else:
        width = known_multiple(known_multiple(known_multiple(width, GRAD), INPUT), OUT)
        c = row // height
        y = row - c * height
        inside = (c < channels)[:, None] & (column < width)[None, :]
        grad_tile = tile_of(rows_of(c, y, grad_c, grad_y, GRAD, WIDE), column, grad_x, GRAD, WIDE)
        input_tile = tile_of(rows_of(c, y, input_c, input_y, INPUT, WIDE), column, input_x, INPUT, WIDE)
        out_tile = tile_of(rows_of(c, y, out_c, out_y, OUT, WIDE), column, out_x, OUT, WIDE)
    value = tl.load(grad + grad_tile, mask=inside, other=0.0)
    other = tl.load(input + input_tile, mask=inside, other=0.0)
    value = value.to(tl.float32)
    tl.store(out + out_tile, rounded(tl.load(factor) * value, out.dtype.element_ty), mask=inside)
    products = value * other.to(tl.float32)
    tl.store(partials + program, tl.sum(tl.sum(products, axis=1), axis=0))


def plan(grad: Tensor, input: Tensor, out: Tensor) -> tuple[launching.Launch, int]:
    """What writes ``factor * grad`` into `out`, and the sums of the tiles' products, float32; and how many those are.

    To be called with grad, input, factor, out and the sums; of `out`, shape and strides alone are read here.
    """
    batch, channels, height, width = grad.shape
    walk = walk_of(out)
    rows, columns, dim = (height * width, channels, 1) if walk == "channels" else (channels * height, width, 3)
    alignments = {
        name: geometry.alignment(tensor, dim, columns)
        for name, tensor in (("GRAD", grad), ("INPUT", input), ("OUT", out))
    }
    config = choose(walk, grad.element_size(), columns, min(alignments.values()))
    row_tiles, column_tiles = -(-rows // config.rows), -(-columns // config.columns)
    programs = batch * row_tiles * column_tiles
    scaled = launching.Launch(
        scale_and_sum,
        (programs,),
        (
            *(channels, height, width),
            *geometry.strides(grad),
            *geometry.strides(input),
            *geometry.strides(out),
            *(row_tiles, column_tiles),
        ),
        {
            "WALK": walk,
            "WIDE": geometry.needs_int64(grad, input, out),
            **alignments,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
            "enable_fp_fusion": False,
        },
        grad,
    )
    return scaled, programs


def launch(grad: Tensor, input: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    scaled, programs = plan(grad, input, out)
    partials = torch.empty(programs, dtype=torch.float32, device=grad.device)
    scaled(grad, input, factor, out, partials)
    return partials


@AtOnce
def weighted_merge_backward(grad: Tensor, input: Tensor, factor: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    shape, out_format = grad.shape, result_format(grad)
    new = allocator(shape, out_format)
    scaled, programs = plan(grad, input, launching.stand_in(shape, grad, out_format))

    def run(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        out = new(grad)
        partials = torch.empty(programs, dtype=torch.float32, device=grad.device)
        scaled(grad, input, factor, out, partials)
        return out, partials.sum()

    return run


def variants() -> Iterator[Variant]:
    """What `launch` may compile: every tile of the table on dense maps, and 16-bit ones on strided maps."""
    cases = [(key, tile, 16) for key, tiles in TABLE.items() for tile in tiles]
    cases += [(key, fitting(tiles, 256, 0), 0) for key, tiles in TABLE.items() if key[1] == 2]
    for (walk, size), config, alignment in cases:
        yield variant(
            scale_and_sum,
            {**dict.fromkeys(("grad", "input", "out"), POINTER_TYPES[size]), "factor": "*fp32", "partials": "*fp32"},
            (),
            {
                **{"WALK": walk, "WIDE": alignment == 0},
                **dict.fromkeys(("GRAD", "INPUT", "OUT"), alignment),
                **{"ROWS": config.rows, "COLUMNS": config.columns},
            },
            {"num_warps": config.num_warps, "enable_fp_fusion": False},
            f"weighted_merge_backward-{walk}-{8 * size}bit-{config.rows}x{config.columns}"
            f"-{'dense' if alignment else 'strided'}",
            aligned=alignment > 0,
            # The factor is read, and the sum written, as a single number.
            wide={"LDG": 1, "STG": 1} if alignment else {},
        )
