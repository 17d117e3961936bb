"""The adjoint of the resize, by gather: each coarse pixel adds up the fine pixels that read it.

A fine pixel's source is non-decreasing along an axis, so the readers of a coarse pixel are a range, found from the
forward's own float32 indices (`device.first_reader`).  No atomics: every coarse pixel is summed by one program, in
float32 and in a fixed order, and rounded once.

Three ways to read a range, by its length: *pairs* (exactly twice the size: two by two, no masks), *windows* of at most
four by four pixels (unrolled, so that all loads are in flight at once), and *areas* of any size (a program to each
coarse pixel, which goes over its fine pixels in tiles).  Each can write, beside its result, the float32 sums of what
it summed: the weights of a fine pixel add up to 1, so these add up to the gradient of the bias (`merge_backward`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, result_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import autotune, geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.upsample_add import TileConfig, fitting, walk_of
from fpn_kernels.backends.triton.upsample_add_backward_kernels import gather_area, gather_channels, gather_planes

PAIRS = 1  # the window that marks the two by two, unmasked case
AREA = 0

_PIXELS_BY_CHANNELS = {
    2: (TileConfig(4, 256, 4), TileConfig(16, 64, 4), TileConfig(64, 16, 4)),
    4: (TileConfig(8, 64, 4), TileConfig(32, 16, 4)),
}
_ROWS_BY_COLUMNS = {2: (TileConfig(16, 32, 4),), 4: (TileConfig(16, 32, 4),)}

# (walk, window, bytes of an element) -> tiles of coarse pixels, the longest first: one 16-byte access a thread of 128
# to each fine pixel of the window.  An area's tiles are of the fine pixels of a single coarse one.
TABLE = {
    **{("channels", window, n): _PIXELS_BY_CHANNELS[n] for window in (PAIRS, 2, 4) for n in (2, 4)},
    **{("planes", window, n): _ROWS_BY_COLUMNS[n] for window in (PAIRS, 2, 4) for n in (2, 4)},
    ("channels", AREA, 2): (TileConfig(16, 64, 4),),
    ("channels", AREA, 4): (TileConfig(16, 32, 4),),
    ("planes", AREA, 2): (TileConfig(16, 64, 4),),
    ("planes", AREA, 4): (TileConfig(16, 64, 4),),
}


def choose(walk: str, window: int, element_size: int, columns: int, access: int) -> TileConfig:
    """The tile for rows of `columns` elements; `access` as for the forward."""
    return fitting(TABLE[walk, window, element_size], columns, access)


def window_of(mode: str, top_size: tuple[int, int], size: tuple[int, int]) -> int:
    """PAIRS, 2 or 4 fine pixels to a side at most, or AREA."""
    if mode != "bilinear" and size == (2 * top_size[0], 2 * top_size[1]):
        return PAIRS
    longest = max(geometry.longest_window(a, b, mode) for a, b in zip(top_size, size, strict=True))
    return 2 if longest <= 2 else 4 if longest <= 4 else AREA


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is computed.

    Attributes:
        walk: "channels" or "planes".
        window: PAIRS, 2, 4 or AREA.
        config: the tile.
        grad_alignment, out_alignment: `geometry.alignment` along the contiguous axis of each.
        row_tiles: tiles of one image row (channels) or of all rows of an image (planes); of areas, coarse pixels.
        column_tiles: tiles of the channels, or of an image row (planes).
        groups: programs to an image row; each goes over a share of its row tiles.
        programs: the grid.
        partials: sums that each channel of the bias is left in.
    """

    walk: str
    window: int
    config: TileConfig
    grad_alignment: int
    out_alignment: int
    row_tiles: int
    column_tiles: int
    groups: int
    programs: int
    partials: int


# Partial sums of the bias to a channel: enough programs to fill a GPU, few enough to be a small part of the traffic (at
# 200 x 320 fine pixels and 16 bits, 1.5 %) and to be added up in one small launch.
MOST_PARTIALS = 512


def plan(grad: Tensor, out: Tensor, mode: str, bias: bool, config: TileConfig | None = None) -> Plan:
    """Chooses the tile and the grid that gather `grad` into `out`; `config` is for measuring."""
    batch, channels, height, width = grad.shape
    top_height, top_width = out.shape[2:]
    walk = walk_of(out)
    window = window_of(mode, (top_height, top_width), (height, width))
    if walk == "channels":
        grad_alignment, out_alignment = (geometry.alignment(t, 1, channels) for t in (grad, out))
    elif window == AREA:
        # A coarse pixel's range starts anywhere, and its channels lie a plane apart.
        grad_alignment, out_alignment = min(geometry.alignment(grad, 3), 1), 0
    else:
        grad_alignment, out_alignment = geometry.alignment(grad, 3, width), geometry.alignment(out, 3, top_width)
    access = grad_alignment if window == AREA else min(grad_alignment, out_alignment)
    if config is None:
        columns = channels if walk == "channels" else top_width
        config = choose(walk, window, grad.element_size(), columns, access)
        if autotune.ENABLED and access > 1:
            config = autotune.fastest(
                "upsample_add_backward",
                (walk, window, access, bias, columns, *autotune.size_class(batch * channels * height * width)),
                grad,
                TABLE[walk, window, grad.element_size()],
                config,
                lambda candidate: _try(plan(grad, out, mode, bias, candidate), grad, out, mode, bias),
            )
    groups = 1
    if window == AREA:
        row_tiles = top_width
        column_tiles = -(-channels // (config.columns if walk == "channels" else config.rows))
        programs = batch * top_height * row_tiles * column_tiles
        partials = batch * top_height * top_width
    elif walk == "channels":
        row_tiles, column_tiles = -(-top_width // config.rows), -(-channels // config.columns)
        groups = row_tiles
        if bias:
            groups = max(1, min(row_tiles, MOST_PARTIALS // (batch * top_height)))
        programs = batch * top_height * groups * column_tiles
        partials = batch * top_height * groups
    else:
        row_tiles, column_tiles = -(-channels * top_height // config.rows), -(-top_width // config.columns)
        programs = batch * row_tiles * column_tiles
        partials = batch * column_tiles * top_height
    return Plan(
        *(walk, window, config, grad_alignment, out_alignment),
        *(row_tiles, column_tiles, groups, programs, partials),
    )


def gather(chosen: Plan, grad: Tensor, out: Tensor, mode: str, *, bias: bool, own: bool) -> launching.Launch:
    """What writes ``own + gain * adjoint(grad)`` into `out`; unscaled sums into partials, float32 [chosen.partials, C].

    To be called with grad, out, own (of the strides of `out`), partials and gain, and with `out` in the place of those
    that there are not; of `out`, shape and strides alone are read here.
    """
    _, channels, height, width = grad.shape
    top_height, top_width = out.shape[2:]
    constexprs: dict[str, Any] = {"WINDOW": chosen.window}
    launched = gather_channels if chosen.walk == "channels" else gather_planes
    if chosen.window == AREA:
        launched, constexprs = gather_area, {"WALK": chosen.walk}
    return launching.Launch(
        launched,
        (chosen.programs,),
        (
            *(geometry.scale(top_height, height), geometry.scale(top_width, width)),
            *(geometry.scale(height, top_height), geometry.scale(width, top_width)),
            *(channels, height, width, top_height, top_width),
            *geometry.strides(grad),
            *geometry.strides(out),
            *(chosen.row_tiles, chosen.column_tiles, chosen.groups),
        ),
        {
            "MODE": "nearest" if chosen.window == PAIRS else mode,
            **constexprs,
            "BIAS": bias,
            "OWN": own,
            "WIDE": geometry.needs_int64(grad, out),
            "GRAD": chosen.grad_alignment,
            "OUT": chosen.out_alignment,
            "ROWS": chosen.config.rows,
            "COLUMNS": chosen.config.columns,
            "num_warps": chosen.config.num_warps,
            # Contracted, the bilinear indices would differ in the last bit from those that windows were sized by.
            "enable_fp_fusion": False,
        },
        grad,
    )


def launch(
    chosen: Plan, grad: Tensor, out: Tensor, own: Tensor | None, partials: Tensor | None, mode: str, gain: float
) -> None:
    run = gather(chosen, grad, out, mode, bias=partials is not None, own=own is not None)
    run(grad, out, out if own is None else own, out if partials is None else partials, gain)


def _try(chosen: Plan, grad: Tensor, out: Tensor, mode: str, bias: bool) -> None:
    """Launches a plan into results that nothing reads."""
    partials = grad.new_empty((chosen.partials, grad.shape[1]), dtype=torch.float32) if bias else None
    launch(chosen, grad, torch.empty_like(out, device=grad.device), None, partials, mode, 1.0)


@AtOnce
def upsample_add_backward(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> Callable[..., Tensor]:
    shape, out_format = (*grad.shape[:2], *top_size), result_format(grad)
    new, like = allocator(shape, out_format), launching.stand_in(shape, grad, out_format)
    adjoint = gather(plan(grad, like, mode, bias=False), grad, like, mode, bias=False, own=False)

    def run(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> Tensor:
        out = new(grad)
        adjoint(grad, out, out, out, gain)
        return out

    return run


def gather_variants(name: str, bias: bool, own: bool = False) -> Iterator[Variant]:
    """What `launch` may compile: every tile of the table on dense maps, and 16-bit ones on strided maps.

    With `own`, the 16-bit tiles alone: a load more, at the places of the store.
    """
    cases = [
        (key, tile, 16) for key, tiles in TABLE.items() for tile in tiles if not own or (key[2] == 2 and key[1] != AREA)
    ]
    if not bias:
        cases += [(key, fitting(tiles, 256, 0), 0) for key, tiles in TABLE.items() if key[2] == 2]
    for (walk, window, size), config, alignment in cases:
        gather = gather_channels if walk == "channels" else gather_planes
        area = {"WALK": walk} if window == AREA else {"WINDOW": window}
        for mode in ("nearest",) if window in (PAIRS, 2) else ("nearest", "bilinear"):
            yield variant(
                gather_area if window == AREA else gather,
                {**dict.fromkeys(("grad", "out", "own"), POINTER_TYPES[size]), "partials": "*fp32"},
                ("gain", "scale_y", "scale_x", "inverse_y", "inverse_x"),
                {
                    **{"MODE": mode, **area, "BIAS": bias, "OWN": own, "WIDE": alignment == 0},
                    "GRAD": 1 if alignment and window == AREA and walk == "planes" else alignment,
                    "OUT": 0 if window == AREA and walk == "planes" else alignment,
                    **{"ROWS": config.rows, "COLUMNS": config.columns},
                },
                {"num_warps": config.num_warps, "enable_fp_fusion": False},
                f"{name}-{walk}-{mode}-{f'window{window}' if window else 'area'}-{8 * size}bit"
                f"-{config.rows}x{config.columns}-{'dense' if alignment else 'strided'}{'-own' if own else ''}",
                aligned=alignment > 0,
                # An own gradient is read as the result is written: half an access in planes, single numbers in areas.
                wide=("LDG",) if alignment and not own and (walk == "channels" or window == PAIRS) else (),
            )


def variants() -> Iterator[Variant]:
    return gather_variants("upsample_add_backward", bias=False)
