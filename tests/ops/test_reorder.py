"""`reorder`: a map copied into another layout, on every backend that is here."""

from __future__ import annotations

import itertools

import pytest
import torch
from samples import DTYPES as DTYPES
from samples import LAYOUTS, random_map
from targets import Target

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

SHAPES = [
    (1, 64, 12, 16),  # whole tiles of every element and every level, more than one block
    (2, 33, 19, 29),  # one channel and some pixels more than whole tiles, in each of two images
    (1, 257, 3, 5),  # fewer pixels than a tile
    (3, 1, 7, 9),  # one channel: both layouts are the same bytes
    (2, 40, 1, 1),  # one pixel: the same
    (1, 5, 1, 300),  # one row
    (1, 70, 150, 1),  # one column
    (0, 3, 4, 4),  # nothing
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", FORMATS)
def test_every_element_arrives(wanted: str, layout: str, target: Target) -> None:
    target.require_operator("reorder")
    for shape, dtype in itertools.product(SHAPES[:-1], target.dtypes()):
        source = random_map(shape, dtype, target.device, layout)
        before = source.clone()
        with target.serves("reorder"):
            result = torch.ops.fpn_kernels.reorder(source, memory_format=FORMATS[wanted])
        assert torch.equal(result, source) and torch.equal(source, before)
        assert result.is_contiguous(memory_format=FORMATS[wanted])
        assert result.data_ptr() != source.data_ptr()
