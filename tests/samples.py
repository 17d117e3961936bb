"""Shapes and layouts of the operator tests, each with the reason why it is there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A merge: batch, channels, the coarser map's size and the finer one's."""

    batch: int
    channels: int
    top: tuple[int, int]
    fine: tuple[int, int]
    why: str

    def __str__(self) -> str:
        h, w = self.top
        height, width = self.fine
        return f"{self.batch}x{self.channels}-{h}x{w}-to-{height}x{width}"


MERGES = [
    Sizes(2, 16, (4, 6), (8, 12), "whole ratio 2, the fast path of every kernel"),
    Sizes(1, 256, (5, 4), (10, 8), "the width of the paper"),
    Sizes(1, 257, (3, 4), (6, 8), "a tail of one channel after whole vectors"),
    Sizes(1, 5, (19, 29), (38, 57), "C5 to C4 of a 600 x 900 image: even rows, odd columns"),
    Sizes(1, 10, (38, 57), (75, 113), "C4 to C3 of a 600 x 900 image: uneven float32 indices"),
    Sizes(2, 1, (1, 1), (7, 9), "a 1 x 1 top over one channel"),
    Sizes(1, 3, (30, 98), (58, 194), "sizes where the float32 index is not the rational one"),
    Sizes(1, 4, (116, 2), (230, 141), "more such sizes, nearest-exact included"),
    Sizes(1, 6, (3, 5), (10, 8), "ratios that are not whole"),
    Sizes(2, 7, (9, 8), (4, 3), "a top larger than the lateral: the resize shrinks"),
    Sizes(1, 2, (5, 3), (5, 3), "equal sizes: the resize is the identity"),
    Sizes(3, 8, (1, 8), (2, 24), "a whole ratio of 3 along one axis"),
]

LAYOUTS = ("nchw", "nhwc", "sliced", "sliced-nhwc", "permuted", "expanded", "misaligned")


def random_map(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", layout: str = "nchw") -> Tensor:
    """Fresh random values of a shape, in one of `LAYOUTS`."""
    n, c, h, w = shape

    def values(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).to(device=device, dtype=dtype)

    if layout == "nhwc":
        return values(n, c, h, w).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return values(n, c + 2, h + 3, 2 * w)[:, 1 : c + 1, 2 : h + 2, ::2]
    if layout == "sliced-nhwc":
        whole = values(n, c + 3, h + 1, w + 2).contiguous(memory_format=torch.channels_last)
        return whole[:, 1 : c + 1, 1:, 1 : w + 1]
    if layout == "permuted":
        return values(w, n, h, c).permute(1, 3, 2, 0)
    if layout == "expanded":
        return values(1, c, 1, w).expand(n, c, h, w)
    if layout == "misaligned":
        return values(n * c * h * w + 1)[1:].view(n, c, h, w)
    assert layout == "nchw", layout
    return values(n, c, h, w)
