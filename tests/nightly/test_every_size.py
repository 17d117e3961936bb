"""Every pair of sizes up to 256 x 512: the nearest index and its inverse, in Python, in the compiled library, in eager.

`F.interpolate` on a channels-last map of four channels is eager's own word: there it takes the float32 index in both
modes (see `fpn_kernels/resampling.py`).  The tables of one size are compared at once, as 131,072 comparisons would
take longer than what they compare.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from targets import needs_library
from torch import Tensor

from fpn_kernels import resampling

LARGEST_IN, LARGEST_OUT = 256, 512
IN_SIZES = range(1, LARGEST_IN + 1)
# Every eighth size from each of the first eight on.
OUT_SIZES = [range(first, LARGEST_OUT + 1, 8) for first in range(1, 9)]
# The tables of all sizes of a source, one after another: where each one's source pixels begin.
_FIRST = torch.tensor(IN_SIZES).cumsum(0) - torch.tensor(IN_SIZES)


@functools.cache
def _ramps() -> list[Tensor]:
    """The numbers of the pixels, for each size.  With fewer channels eager takes its contiguous path."""
    channels_last = torch.channels_last
    return [
        torch.arange(size, dtype=torch.float32).expand(1, 4, 1, size).contiguous(memory_format=channels_last)
        for size in IN_SIZES
    ]


def _eager_indices(out_size: int, mode: str) -> Tensor:
    """Which pixel eager reads, ``[in_size, out_size]``."""
    return torch.stack([F.interpolate(ramp, size=(1, out_size), mode=mode)[0, 0, 0] for ramp in _ramps()])


def _expected_ranges(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Of all tables one after another: the first destination that reads each source pixel, and how many do."""
    every = (indices.long() + _FIRST[:, None]).flatten()
    counts = torch.bincount(every, minlength=int(_FIRST[-1]) + LARGEST_IN)
    start = counts.cumsum(0) - counts
    table = torch.repeat_interleave(torch.arange(LARGEST_IN), torch.tensor(IN_SIZES))
    return start - table * indices.shape[1], counts


@pytest.mark.parametrize("out_sizes", OUT_SIZES, ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_the_tables_in_python(mode: str, out_sizes: range) -> None:
    for out_size in out_sizes:
        eager = _eager_indices(out_size, mode)
        sources = [resampling.source_index(in_size, out_size, mode) for in_size in IN_SIZES]
        assert torch.equal(torch.stack(sources).float(), eager), out_size
        ranges = [resampling.source_ranges(source, size) for source, size in zip(sources, IN_SIZES, strict=True)]
        start, stop = (torch.cat(edges) for edges in zip(*ranges, strict=True))
        first, counts = _expected_ranges(eager)
        assert torch.equal(start, first) and torch.equal(stop - start, counts), out_size
        longest = torch.tensor([resampling.longest_range(in_size, out_size) for in_size in IN_SIZES])
        assert bool((counts <= longest.repeat_interleave(torch.tensor(IN_SIZES))).all()), out_size


@needs_library
@pytest.mark.parametrize("out_sizes", OUT_SIZES, ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_the_tables_in_the_compiled_library(mode: str, out_sizes: range) -> None:
    """Numbered pixels come out as the indices; of ones and of numbered gradients, the ranges' lengths and sums."""
    number = resampling.MODES.index(mode)
    operators = torch.ops.fpn_kernels_native
    merge, gather = operators.upsample_add.default, operators.upsample_add_backward.default
    for out_size in out_sizes:
        zeros, out = torch.zeros(1, 1, 1, out_size), torch.empty(LARGEST_IN, 1, 1, 1, out_size)
        grad = torch.stack([torch.ones(out_size), torch.arange(out_size, dtype=torch.float32)]).view(1, 2, 1, out_size)
        gathered = [torch.empty(1, 2, 1, in_size) for in_size in IN_SIZES]
        for ramp, row, sums in zip(_ramps(), out, gathered, strict=True):
            merge(ramp[:, :1], zeros, number, 1.0, row)
            gather(grad, number, 1.0, sums)
        eager = _eager_indices(out_size, mode)
        assert torch.equal(out.flatten(1), eager), out_size
        first, counts = _expected_ranges(eager)
        lengths, totals = torch.cat([sums.view(2, -1) for sums in gathered], dim=1)
        assert torch.equal(lengths.long(), counts), out_size
        assert torch.equal(totals.long(), counts * first + counts * (counts - 1) // 2), out_size
