"""Every pair of sizes up to 256 x 512: the nearest index and its inverse, in Python, in the compiled library, in eager.

`F.interpolate` on a channels-last map is eager's own word: there it takes the float32 index in every mode (see
`fpn_kernels/resampling.py`).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import resampling
from fpn_kernels.backends import native

LARGEST_IN, LARGEST_OUT = 256, 512
compiled = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")


def _ramp(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32).view(1, 1, 1, size)


def _eager_index(in_size: int, out_size: int, mode: str) -> Tensor:
    # Two channels, or the map would count as NCHW as well.
    ramp = _ramp(in_size).expand(1, 2, 1, in_size).contiguous(memory_format=torch.channels_last)
    return F.interpolate(ramp, size=(1, out_size), mode=mode)[0, 0, 0]


@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_the_tables_of_python(mode: str) -> None:
    """`source_index` is eager's; `source_ranges` holds each destination once, where the index says; no longer than said."""
    for out_size in range(1, LARGEST_OUT + 1):
        destination = torch.arange(out_size)
        for in_size in range(1, LARGEST_IN + 1):
            source = resampling.source_index(in_size, out_size, mode)
            assert torch.equal(source.float(), _eager_index(in_size, out_size, mode)), (in_size, out_size)
            start, stop = resampling.source_ranges(source, in_size)
            inside = (start[source] <= destination) & (destination < stop[source])
            lengths = stop - start
            assert bool(inside.all()) and int(lengths.sum()) == out_size, (in_size, out_size)
            assert int(lengths.max()) <= resampling.longest_range(in_size, out_size), (in_size, out_size)
