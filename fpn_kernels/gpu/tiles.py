"""Tiles of the memory-bound kernels: which way to walk over a map, how the coarser map is read, which tile fits."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Pixels or rows of a tile, channels or columns of it (coarse ones at ratio 2), and warps."""

    rows: int
    columns: int
    num_warps: int


def fitting(tiles: tuple[TileConfig, ...], columns: int, access: int) -> TileConfig:
    """The first tile (they are sorted from the longest) of which at least three quarters are used, else the last.

    Args:
        tiles: the candidates.
        columns: elements per row.
        access: elements that the layouts allow to be moved at once, 0 for strided ones.  Where it is 1 or less, each
            element has an address of its own, and the tile gets twice the threads: otherwise registers run out.
    """
    filled = [tile for tile in tiles if 4 * columns >= 3 * tile.columns * -(-columns // tile.columns)]
    tile = filled[0] if filled else tiles[-1]
    return tile if access > 1 else dataclasses.replace(tile, num_warps=2 * tile.num_warps)


def walk_of(tensor: Tensor) -> str:
    """How to walk over a tensor that is written (or a gradient that is read): along its "channels" or its "planes"."""
    return "channels" if tensor.shape[1] > 1 and tensor.stride(1) == 1 else "planes"


def reading_of(mode: str, top_size: tuple[int, int], size: tuple[int, int]) -> str:
    """How a tile reads the top: "pairs" at exactly twice the size, else "nearest" or "bilinear"."""
    if mode == "bilinear":
        return "bilinear"
    return "pairs" if size == (2 * top_size[0], 2 * top_size[1]) else "nearest"
