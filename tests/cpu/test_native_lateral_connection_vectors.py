"""The compiled library's lateral connection by vectors of floats, called directly on each ISA that has them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import oracle
import pytest
import torch
from levels import AVX2, AVX512, LEVELS, PORTABLE, here, limit, limited
from native_calls import by_native
from samples import random_map
from torch import Tensor

from fpn_kernels import native, reference, resampling

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Layouts of feature and result that the library computes.
LAYOUTS = [("nchw", "nchw"), ("nchw", "nhwc"), ("nhwc", "nhwc"), ("sliced", "nchw"), ("sliced-nhwc", "nhwc")]
# bfloat16 by floats, if the CPU has nothing better.
PRODUCTS = [
    *((torch.float32, level) for level in (AVX2, AVX512)),
    *((torch.float16, level) for level in (AVX2, AVX512)),
    (torch.bfloat16, AVX2),
]

# Batch, input and output channels, size, top's size.
CASES = {
    "whole tiles and panels": (1, 128, 64, (6, 32), (3, 16)),
    "tails of pixels, of channels and of a panel": (2, 131, 77, (7, 29), (4, 15)),
    "channels in rows a power of two apart": (1, 1024, 40, (5, 8), (3, 4)),
    "half a panel": (1, 40, 16, (9, 11), (5, 6)),
    "one pixel": (3, 64, 33, (1, 1), (1, 1)),
    "one channel": (2, 1, 2, (5, 17), (3, 9)),
    "a shrinking resize": (1, 32, 40, (4, 9), (9, 20)),
    "more pixels than a block has": (1, 17, 34, (40, 41), (20, 21)),
    "many pixels": (2, 24, 34, (64, 65), (32, 33)),
    "more sums than the cache holds at once": (1, 48, 1500, (10, 13), (5, 7)),
}


@pytest.fixture(params=PRODUCTS, ids=lambda pair: f"{pair[0]}-{LEVELS[pair[1]]}")
def product(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, int]]:
    """A dtype, on an ISA that multiplies it."""
    dtype, level = request.param
    if max(here()) < level:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    with limited(level):
        yield dtype, level


@pytest.fixture
def dtype(product: tuple[torch.dtype, int]) -> torch.dtype:
    return product[0]


def _operands(name: str, dtype: torch.dtype, layouts: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, cin, cout, size, top_size = CASES[name]
    # The library requires evenly spaced pixels, which "sliced" maps do not have.
    feature = random_map((batch, cin, *size), dtype, layout=layouts[0].removeprefix("sliced-"))
    if layouts[0].startswith("sliced"):
        channels = torch.cat((feature, torch.full_like(feature, math.nan)), 1)
        feature = channels.contiguous(memory_format=FORMATS[layouts[0].partition("-")[2] or "nchw"])[:, :cin]
    weight = random_map((cout, cin, 1, 1), dtype).flatten(1) / cin**0.5
    bias = random_map((1, cout, 1, 1), dtype).flatten()
    return feature, weight, bias, random_map((batch, cout, *top_size), dtype, layout=layouts[1])


def _merged(
    feature: Tensor, weight: Tensor, bias: Tensor, top: Tensor | None, mode: str, gain: float, result: str
) -> tuple[Tensor, Tensor] | None:
    """The result, and the larger memory full of NaN around it; None if the call is left to PyTorch."""
    shape = (feature.shape[0], weight.shape[0], *feature.shape[2:])
    strides = torch.empty(shape, device="meta", memory_format=FORMATS[result]).stride()
    memory = torch.full((math.prod(shape) + 70,), math.nan, dtype=feature.dtype)
    out = memory.as_strided(shape, strides, 35)
    number = resampling.MODES.index(mode)
    served = torch.ops.fpn_kernels_native.lateral_connection(feature, weight, bias.float(), top, number, gain, out)
    assert memory[:35].isnan().all() and memory[-35:].isnan().all()
    assert served or memory.isnan().all()
    path = torch.ops.fpn_kernels_native.lateral_connection_path(feature, weight, top, result == "nhwc")
    assert served == (path not in ("", "convolution"))
    return (out, memory) if served else None


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-to-".join)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, layouts: tuple[str, str], product: tuple[torch.dtype, int]) -> None:
    feature, weight, bias, top = _operands(name, product[0], layouts)
    matrix = weight[:, :, None, None]
    for given, mode, gain in (
        (top, "nearest", 1.0),
        (top, "nearest-exact", 0.5),
        (top, "bilinear", 0.7),
        (None, "nearest", 1.0),
    ):
        result = _merged(feature, weight, bias, given, mode, gain, layouts[1])
        if result is None:
            continue  # PyTorch's convolution is faster
        eager = reference.lateral_connection(feature, matrix, bias, given, mode=mode, gain=gain)
        exact = oracle.lateral_connection(feature, weight, bias, given, mode=mode, gain=gain)
        assert oracle.no_worse_than_eager(result[0], eager, exact)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-to-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_isa_gives_the_same_bits(dtype: torch.dtype, layouts: tuple[str, str]) -> None:
    """The tiles differ; the order of each sum does not."""
    if max(here()) < AVX512:
        pytest.skip("this CPU has only one such ISA")
    for name in CASES:
        operands = _operands(name, dtype, layouts)
        with limited(AVX2):
            narrow = _merged(*operands, "bilinear", 0.7, layouts[1])
            limit(AVX512)
            wide = _merged(*operands, "bilinear", 0.7, layouts[1])
        assert narrow is None or wide is None or torch.equal(narrow[0], wide[0])


def test_weights_of_any_strides(dtype: torch.dtype) -> None:
    for layouts in (("nchw", "nchw"), ("nhwc", "nhwc")):
        feature, weight, bias, top = _operands("tails of pixels, of channels and of a panel", dtype, layouts)
        dense = _merged(feature, weight, bias, top, "nearest", 1.0, layouts[1])
        turned = weight.t().contiguous().t()
        spread = torch.stack((weight, weight), 2).flatten(1)[:, ::2]
        assert dense is not None
        for strided in (turned, spread):
            again = _merged(feature, strided, bias, top, "nearest", 1.0, layouts[1])
            assert again is not None and torch.equal(again[0], dense[0])


def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for layouts in (("nchw", "nchw"), ("nhwc", "nhwc")):
            operands = _operands("more pixels than a block has", dtype, layouts)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                result = _merged(*operands, "nearest", 1.0, layouts[1])
                assert result is not None
                results.append(result[0])
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_what_is_declined_is_computed_another_way(dtype: torch.dtype) -> None:
    """An NCHW result of an NHWC feature, and a top in another layout than the result."""
    feature, weight, bias, top = _operands("tails of pixels, of channels and of a panel", dtype, ("nhwc", "nhwc"))
    assert _merged(feature, weight, bias, top, "nearest", 1.0, "nchw") is None
    assert _merged(feature, weight, bias, top.contiguous(), "nearest", 1.0, "nhwc") is None
    exact = oracle.lateral_connection(feature, weight, bias, top, gain=0.5)
    eager = reference.lateral_connection(feature, weight[:, :, None, None], bias, top, gain=0.5)
    for coarse, memory_format in ((top, torch.contiguous_format), (top.contiguous(), torch.channels_last)):
        result = by_native("lateral_connection", feature, weight, bias, coarse, "nearest", 0.5, memory_format)
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)
        assert oracle.no_worse_than_eager(result, eager, exact)


@pytest.mark.parametrize("of", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_vectors_nothing_is_served(of: torch.dtype) -> None:
    operands = _operands("half a panel", of, ("nchw", "nchw"))
    with limited(PORTABLE):
        assert _merged(*operands, "nearest", 1.0, "nchw") is None
