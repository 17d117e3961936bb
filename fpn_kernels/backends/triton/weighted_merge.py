"""`weighted_merge`: two or three maps times their factors, in one pass, summed in float32 and rounded once.

The walks, and the tiles of coarse pixels at ratio 2, are those of `upsample_add`.  One map at most is resized; it goes
last, after the *middle* one of three, which like the first has the result's own size.  The weights are read and
normalised by the programs: the host never waits for them, and nothing is launched for them.  (On an H100 PyTorch's
launches for that made a node of 100 x 160 pixels take 16.4 us, where torch.compile's one kernel took 8.4.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, result_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.upsample_add import TileConfig, fitting, reading_of, walk_of
from fpn_kernels.backends.triton.weighted_merge_kernels import NORMALIZATIONS, weighted_channels, weighted_planes

# What the kernels read weights as, on every chip: of the 8-bit floats compute capability 8.0 reads one.
_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}

READINGS = ("same", "pairs", "nearest", "bilinear")

# (walk, how the last map is read, bytes of an element) -> tiles, the longest first; of coarse pixels for "pairs".  As
# for `upsample_add`, without its tiles for very few channels: the narrowest BiFPN has 64.
TABLE = {
    **{("channels", reading, 2): (TileConfig(8, 256, 4), TileConfig(32, 64, 4)) for reading in ("same", "nearest")},
    **{("channels", reading, 2): (TileConfig(4, 256, 4), TileConfig(16, 64, 4)) for reading in ("pairs", "bilinear")},
    **{("channels", reading, 4): (TileConfig(16, 64, 4),) for reading in ("same", "nearest")},
    **{("channels", reading, 4): (TileConfig(8, 64, 4),) for reading in ("pairs", "bilinear")},
    **{("planes", "pairs", size): (TileConfig(16, 32, 4),) for size in (2, 4)},
    **{("planes", reading, 2): (TileConfig(32, 64, 4),) for reading in ("same", "nearest")},
    **{("planes", reading, 4): (TileConfig(16, 64, 4),) for reading in ("same", "nearest")},
    **{("planes", "bilinear", size): (TileConfig(16, 64, 4),) for size in (2, 4)},
}


def choose(walk: str, reading: str, element_size: int, columns: int, access: int, third: bool) -> TileConfig:
    """The tile for rows of `columns` elements; `access` as for `upsample_add`; `third`: of three maps."""
    tile = fitting(TABLE[walk, reading, element_size], columns, access)
    if third and access <= 1 and (walk, reading, element_size) == ("planes", "nearest", 2):
        # Triton 3.6's assembler keeps 32 rows to 64 registers, and spills two (sm_90; 3.7's spills none).
        return dataclasses.replace(tile, rows=tile.rows // 2)
    return tile


def plan(
    first: Tensor,
    middle: Tensor | None,
    last: Tensor,
    last_factor: int,
    out: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> launching.Launch:
    """What writes the weighted sum into `out`; `last_factor` is the place of the last map's weight, 1 or 2.

    To be called with first, middle (first where there is none), last, the weights and out; of `out`, shape and strides
    alone are read here.
    """
    batch, channels, height, width = first.shape
    last_height, last_width = last.shape[2:]
    walk = walk_of(out)
    reading = "same" if last.shape == first.shape else reading_of(mode, (last_height, last_width), (height, width))
    pairs = reading == "pairs"
    third = middle is not None
    same_size = {"FIRST": first, "MIDDLE": first if middle is None else middle, "OUT": out}
    if walk == "channels":
        launched, columns, outer = weighted_channels, channels, batch * (last_height if pairs else height)
        rows = last_width if pairs else width
        alignments = {name: geometry.alignment(x, 1, channels) for name, x in (*same_size.items(), ("LAST", last))}
    else:
        launched, outer = weighted_planes, batch
        rows, columns = (channels * last_height, last_width) if pairs else (channels * height, width)
        alignments = {name: geometry.alignment(x, 3, width) for name, x in same_size.items()}
        # A map that is resized otherwise is gathered element by element.
        alignments["LAST"] = geometry.alignment(last, 3, last_width) if reading in ("same", "pairs") else 0
    gathered = walk == "planes" and reading in ("nearest", "bilinear")
    access = min(a for name, a in alignments.items() if name != "LAST" or not gathered)
    config = choose(walk, reading, first.element_size(), columns, access, third)
    row_tiles, column_tiles = -(-rows // config.rows), -(-columns // config.columns)
    return launching.Launch(
        launched,
        (row_tiles * column_tiles * outer,),
        (
            *(geometry.scale(last_height, height), geometry.scale(last_width, width)),
            # Only where the positive parts are divided by their sum is anything added to it.
            eps if normalization == "relu" else 0.0,
            *(NORMALIZATIONS.index(normalization), last_factor, channels, height, width, last_height, last_width),
            *geometry.strides(first),
            *geometry.strides(same_size["MIDDLE"]),
            *geometry.strides(last),
            *geometry.strides(out),
            *(row_tiles, column_tiles),
        ),
        {
            "READING": reading,
            "MODE": mode if reading in ("nearest", "bilinear") else "nearest",
            "THIRD": third,
            "WIDE": geometry.needs_int64(first, same_size["MIDDLE"], last, out),
            **alignments,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
            # Products are rounded before they are summed, as on the CPU and under the interpreter.
            "enable_fp_fusion": False,
        },
        first,
    )


def _read(weights: Tensor) -> Tensor:
    """The weights as the kernels read them: one after the other, of a dtype that every chip knows."""
    return (weights if weights.dtype in _POINTERS else weights.float()).contiguous()


def launch(
    first: Tensor,
    middle: Tensor | None,
    last: Tensor,
    last_factor: int,
    weights: Tensor,
    out: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> None:
    run = plan(first, middle, last, last_factor, out, mode, normalization, eps)
    run(first, first if middle is None else middle, last, _read(weights), out)


@AtOnce
def weighted_merge(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> Callable[..., Tensor]:
    shape, out_format = first.shape, result_format(first)
    new = allocator(shape, out_format)
    # The last map is the one that may have another size.
    second_is_last = third is None or second.shape != first.shape
    middle, last, last_factor = (third, second, 1) if second_is_last else (second, third, 2)
    assert last is not None
    merge = plan(
        first, middle, last, last_factor, launching.stand_in(shape, first, out_format), mode, normalization, eps
    )

    def run(first: Tensor, second: Tensor, third: Tensor | None, weights: Tensor, mode: str, *_: object) -> Tensor:
        out = new(first)
        middle, last = (third, second) if second_is_last else (second, third)
        merge(first, first if middle is None else middle, last, _read(weights), out)
        return out

    return run


def variants() -> Iterator[Variant]:
    """What `launch` may compile: every tile of the table on dense maps, and 16-bit ones on strided maps.

    Weights of another dtype than float32 are read alike in every one of them: they are described once a kernel.
    """
    usual, *others = _POINTERS.values()
    both = (False, True)
    cases = [(key, tile, 16, usual, third) for key, tiles in TABLE.items() for tile in tiles for third in both]
    cases += [(key, choose(*key, 256, 0, third), 0, usual, third) for key in TABLE if key[2] == 2 for third in both]
    keys = (("channels", "same", 2), ("planes", "same", 2))
    cases += [(key, TABLE[key][0], 16, other, True) for key in keys for other in others]
    for (walk, reading, size), config, alignment, weights, third in cases:
        gathered = walk == "planes" and reading in ("nearest", "bilinear")
        yield variant(
            weighted_channels if walk == "channels" else weighted_planes,
            {**dict.fromkeys(("first", "middle", "last", "out"), POINTER_TYPES[size]), "weights": weights},
            ("scale_y", "scale_x", "eps"),
            {
                **{"READING": reading, "MODE": "bilinear" if reading == "bilinear" else "nearest"},
                **{"THIRD": third, "WIDE": alignment == 0},
                **{"FIRST": alignment, "MIDDLE": alignment, "LAST": 0 if gathered else alignment, "OUT": alignment},
                **{"ROWS": config.rows, "COLUMNS": config.columns},
            },
            {"num_warps": config.num_warps, "enable_fp_fusion": False},
            f"weighted_merge-{walk}-{reading}-{'three' if third else 'two'}-{8 * size}bit"
            f"-{config.rows}x{config.columns}-{'dense' if alignment else 'strided'}"
            + ("" if weights == usual else f"-weights-{weights[1:]}"),
            aligned=alignment > 0,
            # The weights are single numbers; in the planes a coarse map is read in shorter runs, or gathered.
            wide={"STG": 0, **({"LDG": 2 + third} if walk == "channels" or reading == "same" else {})}
            if alignment
            else {},
        )
