"""`upsample_add` by Triton: ``out = gain * (lateral + resize(top))`` in one pass, summed in float32, rounded once.

There are two walks over the result, chosen by its layout.  *channels* (NHWC): a program has some pixels of one image
row and a run of channels.  *planes* (NCHW and the rest): a program has some image rows, of one or several channels, and
a run of columns.  Either way the index of the coarse pixel is computed once per row or column of the tile, and integers
are divided once per program or once per row.

At ratio 2 (both sizes exactly doubled, any nearest mode) the source is ``dst >> 1``, and a tile is one of *coarse*
pixels: each is loaded once and serves its four fine pixels.  Fine and coarse loads are issued before the first use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.gpu.launch import Launch, stand_in
from fpn_kernels.gpu.tiles import TileConfig, fitting, reading_of, walk_of
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.layouts import allocator, result_format
from fpn_kernels.operators.upsample_add.call import UpsampleAdd

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
    """The tile for rows of `columns` elements (channels, or columns as the tile counts them); see `tiles.fitting`."""
    return fitting(TABLE[walk, reading, element_size], columns, access)


def plan_merge(top: Tensor, lateral: Tensor, out: Tensor, mode: str, config: TileConfig | None = None) -> Launch:
    """Plan the launch that writes ``gain * (lateral + resize(top))`` into `out`, which may be `lateral` itself.

    Args:
        top, lateral, out: of `out`, and of a `lateral` that is not written yet, only shape and strides are read.
        mode: of the call.
        config: the tile, for measurements; None chooses it.

    Returns:
        The launch, a function of top, lateral, out and gain.
    """
    from fpn_kernels.operators.upsample_add import kernels

    batch, channels, height, width = lateral.shape
    top_height, top_width = top.shape[2:]
    walk = walk_of(out)
    reading = reading_of(mode, (top_height, top_width), (height, width))
    pairs = reading == "pairs"
    alignments: dict[str, int]
    if walk == "channels":
        launched, columns, outer = kernels.merge_channels, channels, batch * (top_height if pairs else height)
        rows = top_width if pairs else width
        alignments = {
            name: geometry.alignment(tensor, 1, channels)
            for name, tensor in (("TOP", top), ("LATERAL", lateral), ("OUT", out))
        }
    else:
        launched, outer = kernels.merge_planes, batch
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
    return Launch(
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


def _try(config: TileConfig, top: Tensor, lateral: Tensor, out: Tensor, mode: str) -> None:
    """Launch a tile into a result that nothing reads."""
    result = torch.zeros_like(out, device=top.device)
    lateral = result if lateral.is_meta else lateral
    plan_merge(top, lateral, result, mode, config)(top, lateral, result, 1.0)


def _refusal(call: UpsampleAdd) -> str | None:
    top, lateral = call.top, call.lateral
    return (
        availability.tensor_refusal(lateral)
        or availability.side_refusal(*top.shape[2:], *lateral.shape[2:])
        or availability.rows_refusal(lateral.shape[1], lateral.shape[2])
    )


def _plan(call: UpsampleAdd) -> Callable[[UpsampleAdd], Tensor]:
    shape, out_format = call.lateral.shape, result_format(call.lateral)
    new = allocator(shape, out_format)
    merge = plan_merge(call.top, call.lateral, stand_in(shape, call.lateral, out_format), call.mode)

    def run(call: UpsampleAdd) -> Tensor:
        out = new(call.lateral)
        merge(call.top, call.lateral, out, call.gain)
        return out

    return run


UPSAMPLE_ADD = dispatch.Implementation(
    autotune.planned(_plan),
    _refusal,
    lambda call: availability.interpreter_only(call.top),
)
