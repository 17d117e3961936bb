"""The compiled library's copy between layouts: every ISA, and every branch of the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from levels import LEVELS, here, limit, limited
from samples import LAYOUTS, random_map

from fpn_kernels import native

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [
    (1, 64, 12, 16),  # whole tiles of every dtype and ISA, several blocks
    (2, 33, 19, 29),  # a remainder of one channel and some pixels, in two images
    (1, 257, 3, 5),  # fewer pixels than a tile
    (3, 1, 7, 9),  # one channel: both layouts have the same bytes
    (2, 40, 1, 1),  # one pixel: the same
    (1, 5, 1, 300),  # one row
    (1, 70, 150, 1),  # one column
]


@pytest.fixture
def levels() -> Iterator[list[int]]:
    """The ISAs of this CPU, in a test that may limit them."""
    with limited(max(LEVELS)):
        yield here()


def _reordered(source: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """A copy into a result full of NaN, between two guards that must not be written."""
    guard = 64
    strides = torch.empty(source.shape, device="meta", memory_format=memory_format).stride()
    memory = torch.full((source.numel() + 2 * guard,), float("nan"), dtype=source.dtype)
    out = memory.as_strided(source.shape, strides, guard)
    torch.ops.fpn_kernels_native.reorder(source, out)
    assert memory[:guard].isnan().all() and memory[-guard:].isnan().all()
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked", FORMATS)
def test_every_isa_writes_every_element(asked: str, dtype: torch.dtype, layout: str, levels: list[int]) -> None:
    for level in levels:
        limit(level)
        for shape in SHAPES:
            source = random_map(shape, dtype, layout=layout)
            assert torch.equal(_reordered(source, FORMATS[asked]), source)


def test_bits_are_moved_as_they_are(levels: list[int]) -> None:
    """Signalling NaNs, payloads and negative zeros: no element is treated as a number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, 64, 32, 32)
    for level in levels:
        limit(level)
        for dtype in (torch.bfloat16, torch.float16):
            for asked in FORMATS.values():
                source = every.contiguous(
                    memory_format=torch.channels_last if asked == torch.contiguous_format else torch.contiguous_format
                )
                out = torch.zeros_like(every, memory_format=asked)
                torch.ops.fpn_kernels_native.reorder(source.view(dtype), out.view(dtype))
                assert torch.equal(out, every)


@pytest.mark.nightly
@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize(
    "shape", [(1, 64, 512, 400), (1, 96, 361, 367), (2, 33, 400, 512)], ids=["aligned", "odd pixels", "odd channels"]
)
def test_a_result_written_past_the_caches(shape: tuple[int, ...], asked: str, levels: list[int]) -> None:
    """Results of 24 MB or more with aligned lines are written past the caches."""
    source = random_map(shape, torch.bfloat16, layout="nhwc" if asked == "nchw" else "nchw")
    assert source.numel() * 2 >= 24 << 20
    for level in levels:
        limit(level)
        assert torch.equal(_reordered(source, FORMATS[asked]), source)


@pytest.mark.parametrize("asked", FORMATS)
def test_the_number_of_threads_does_not_show(asked: str) -> None:
    source = random_map((3, 50, 75, 113), torch.bfloat16, layout="sliced-nhwc" if asked == "nchw" else "sliced")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(_reordered(source, FORMATS[asked]), source)
    finally:
        torch.set_num_threads(before)
