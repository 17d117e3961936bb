"""`reorder`: a map copied into another layout, on every backend that is here."""

from __future__ import annotations

import pytest
import torch
from samples import LAYOUTS, random_map
from targets import Target

import fpn_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

SHAPES = [
    (1, 64, 12, 16),  # whole tiles of every element and every level, more than one block
    (2, 33, 19, 29),  # one channel and some pixels beside the whole tiles, in each of two images
    (1, 257, 3, 5),  # fewer pixels than a tile
    (3, 1, 7, 9),  # one channel: both layouts are the same bytes
    (2, 40, 1, 1),  # one pixel: the same
    (1, 5, 1, 300),  # one row
    (1, 70, 150, 1),  # one column
    (0, 3, 4, 4),  # nothing
]


def _reorder(source: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    return torch.ops.fpn_kernels.reorder(source, memory_format=memory_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked", FORMATS)
def test_every_element_arrives(asked: str, dtype: torch.dtype, layout: str, target: Target) -> None:
    target.require_operator("reorder")
    for shape in SHAPES[:-1]:
        source = random_map(shape, dtype, target.device, layout)
        before = source.clone()
        with target.serves("reorder"):
            result = _reorder(source, FORMATS[asked])
        assert torch.equal(result, source) and torch.equal(source, before)
        assert result.is_contiguous(memory_format=FORMATS[asked])
        assert result.data_ptr() != source.data_ptr()


def test_empty_batch(target: Target) -> None:
    target.require_operator("reorder")
    with fpn_kernels.use_backend(target.backend):
        result = _reorder(torch.empty(SHAPES[-1], device=target.device), torch.channels_last)
    assert result.shape == SHAPES[-1] and result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("asked", FORMATS)
def test_opcheck(asked: str, layout: str, target: Target) -> None:
    target.require_operator("reorder")
    for requires_grad in (False, True):
        source = random_map(SHAPES[1], torch.float32, target.device, layout).requires_grad_(requires_grad)
        target.opcheck(torch.ops.fpn_kernels.reorder.default, (source,), {"memory_format": FORMATS[asked]})


def test_gradcheck(target: Target) -> None:
    target.require(torch.float64)
    target.require_operator("reorder")
    source = random_map((2, 3, 4, 2), torch.float64, target.device).requires_grad_()
    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(lambda s: _reorder(s, torch.channels_last) ** 2, [source])
        assert torch.autograd.gradgradcheck(lambda s: _reorder(s, torch.channels_last) ** 2, [source])


BAD = {
    "rank": (torch.ones(2, 3, 4), torch.channels_last, ValueError, "source: expected 4 dimensions"),
    "dtype": (torch.ones(1, 2, 3, 4).int(), torch.channels_last, TypeError, "source: .*got torch.int32"),
    "format": (torch.ones(1, 2, 3, 4), torch.preserve_format, ValueError, "memory_format: .*got torch.preserve_format"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    source, memory_format, error, message = BAD[case]
    with pytest.raises(error, match=message):
        _reorder(source, memory_format)
