"""The compiled library's lateral connection by AMX tiles, called directly."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from levels import AMX, AVX512, here, limited
from native_calls import by_native
from samples import LAYOUTS, random_map
from torch import Tensor

from fpn_kernels import native, reference, resampling

pytestmark = pytest.mark.skipif(
    native.load_error() is not None or max(here()) < AMX, reason="no compiled library, or no AMX here"
)

BFLOAT16 = torch.bfloat16
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Batch, input and output channels, size, top's size.
CASES = {
    "C5 of 800 x 1280, read in place": (1, 1024, 256, (25, 40), (13, 20)),
    "more channels than are read in place": (1, 2048, 64, (13, 20), (7, 10)),
    "tails of pixels, of channels and of a panel": (2, 100, 77, (19, 29), (10, 15)),
    "one pixel": (3, 64, 32, (1, 1), (1, 1)),
    "one channel": (2, 1, 1, (5, 17), (3, 9)),
    "a shrinking resize": (1, 32, 40, (4, 9), (9, 20)),
    "more maps than blocks": (7, 16, 48, (3, 5), (2, 3)),
    "maps that the last cache may not hold": (1, 256, 33, (220, 223), (110, 112)),
}


def _operands(name: str, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, cin, cout, size, top_size = CASES[name]
    feature = random_map((batch, cin, *size), BFLOAT16, layout=layout)
    weight = random_map((cout, cin, 1, 1), BFLOAT16).flatten(1) / cin**0.5
    bias = random_map((1, cout, 1, 1), BFLOAT16).flatten()
    return feature, weight, bias, random_map((batch, cout, *top_size), BFLOAT16, layout="nhwc")


def _merged(
    feature: Tensor, weight: Tensor, bias: Tensor, top: Tensor | None, mode: str, gain: float, memory_format: str
) -> tuple[Tensor, Tensor]:
    """The result, and the larger memory full of NaN around it."""
    shape = (feature.shape[0], weight.shape[0], *feature.shape[2:])
    strides = torch.empty(shape, device="meta", memory_format=FORMATS[memory_format]).stride()
    memory = torch.full((math.prod(shape) + 70,), math.nan, dtype=BFLOAT16)
    out = memory.as_strided(shape, strides, 35)
    number = resampling.MODES.index(mode)
    arguments = (feature, weight, bias.float(), top, number, gain, out)
    assert torch.ops.fpn_kernels_native.lateral_connection(*arguments), "left to PyTorch"
    return out, memory


@pytest.mark.parametrize("result", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, layout: str, result: str) -> None:
    feature, weight, bias, top = _operands(name, layout)
    matrix = weight[:, :, None, None]
    for mode, gain in (("nearest", 1.0), ("nearest-exact", 0.5), ("bilinear", 0.7)):
        out, memory = _merged(feature, weight, bias, top, mode, gain, result)
        eager = reference.lateral_connection(feature, matrix, bias, top, mode=mode, gain=gain)
        exact = oracle.lateral_connection(feature, weight, bias, top, mode=mode, gain=gain)
        assert oracle.no_worse_than_eager(out, eager, exact)
        assert memory[:35].isnan().all() and memory[-35:].isnan().all()
    path = torch.ops.fpn_kernels_native.lateral_connection_path
    if path(feature, weight, None, result == "nhwc") != "AMX tiles":
        return  # PyTorch's convolution is faster
    out, _ = _merged(feature, weight, bias, None, "nearest", 1.0, result)
    exact = oracle.lateral_connection(feature, weight, bias, None)
    assert oracle.no_worse_than_eager(out, reference.lateral_connection(feature, matrix, bias), exact)


@pytest.mark.parametrize("result", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
def test_nothing_around_a_slice_is_read(layout: str, result: str) -> None:
    feature, weight, bias, top = _operands("tails of pixels, of channels and of a panel", "nchw")
    whole = torch.full((2, 140, 27, 40), math.nan, dtype=BFLOAT16).contiguous(memory_format=FORMATS[layout])
    part = whole[:, 7:107, 4:23, 5:34]
    part.copy_(feature)
    around = torch.full((2, 90, 13, 19), math.nan, dtype=BFLOAT16).contiguous(memory_format=torch.channels_last)
    coarse = around[:, 3:80, 1:11, 2:17]
    coarse.copy_(top)
    for mode in resampling.MODES:
        ours, _ = _merged(part, weight, bias, coarse, mode, 1.0, result)
        dense, _ = _merged(feature, weight, bias, top, mode, 1.0, result)
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("name", ["C5 of 800 x 1280, read in place", "tails of pixels, of channels and of a panel"])
def test_the_same_bits_for_any_number_of_threads_and_in_any_layout(name: str) -> None:
    feature, weight, bias, top = _operands(name, "nhwc")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            for source in (feature, feature.contiguous()):
                results += [_merged(source, weight, bias, top, "nearest", 1.0, result)[0] for result in FORMATS]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_weights_of_any_strides() -> None:
    feature, weight, bias, top = _operands("tails of pixels, of channels and of a panel", "nhwc")
    dense, _ = _merged(feature, weight, bias, top, "nearest", 1.0, "nhwc")
    turned = weight.t().contiguous().t()
    spread = torch.stack((weight, weight), 2).flatten(1)[:, ::2]
    for strided in (turned, spread):
        assert torch.equal(_merged(feature, strided, bias, top, "nearest", 1.0, "nhwc")[0], dense)


def test_a_top_in_nchw_is_left_to_the_caller() -> None:
    feature, weight, bias, top = _operands("C5 of 800 x 1280, read in place", "nhwc")
    out = torch.full((1, 256, 25, 40), math.nan, dtype=BFLOAT16)
    operator = torch.ops.fpn_kernels_native.lateral_connection
    assert not operator(feature, weight, bias.float(), top.contiguous(), 0, 1.0, out)
    assert out.isnan().all()
    whole = by_native("lateral_connection", feature, weight, bias, top.contiguous(), "nearest", 1.0, None)
    assert torch.equal(whole, _merged(feature, weight, bias, top, "nearest", 1.0, "nhwc")[0])


def test_the_level_decides() -> None:
    assert torch.ops.fpn_kernels_native.multiplies_by_tiles()
    with limited(AVX512):
        assert not torch.ops.fpn_kernels_native.multiplies_by_tiles()
