"""The compiled library's gradient of the 3x3 weight by Winograd's minimal filtering, called directly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import oracle
import pytest
import torch
from levels import AVX2, AVX512, LEVELS, PORTABLE, here, limited
from samples import random_map
from test_native_backward_weight_amx import Case, called, exact, whole_numbers
from torch import Tensor

import fpn_kernels
from fpn_kernels import native
from fpn_kernels.operators import aten

pytestmark = pytest.mark.skipif(
    native.load_error() is not None or max(here()) < AVX2, reason="no compiled library, or no AVX2 here"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    Case(1, 64, 64, (16, 32)),  # whole tiles, panels and blocks
    Case(2, 19, 27, (15, 17)),  # tails in every dimension
    Case(1, 129, 33, (23, 30)),  # one channel after whole parts, one after a panel
    Case(3, 33, 145, (21, 22)),  # blocks that continue from map to map; a part of one row of sums
    Case(40, 16, 24, (3, 2)),  # more maps than a block has tiles
    Case(1, 31, 80, (2, 301)),  # one line of tiles
    Case(1, 16, 40, (130, 1)),  # one column
]
# C5 of an 800 x 1280 image: several parts
LARGE = pytest.param(Case(1, 256, 256, (25, 40)), marks=pytest.mark.nightly)


@pytest.fixture(autouse=True)
def avx2() -> Iterator[None]:
    """AVX2 and one thread by default: with more threads, few channels are left to PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with limited(AVX2):
        yield
    torch.set_num_threads(before)


def _maps(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad = random_map((case.batch, case.cout, *case.size), dtype, layout="nhwc")
    return grad, random_map((case.batch, case.cin, *case.size), dtype, layout="nhwc")


@pytest.mark.parametrize("result", ["nchw", "nhwc"])
@pytest.mark.parametrize("layout", ["nhwc", "sliced-nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_whole_numbers_bit_for_bit(case: Case, dtype: torch.dtype, layout: str, result: str) -> None:
    """Each product of pixels is in its sum, and no other; half sums are exact as well."""
    grad = whole_numbers((case.batch, case.cout, *case.size), layout, dtype)
    feature = whole_numbers((case.batch, case.cin, *case.size), layout, dtype)
    served, of_weight, of_bias = called(grad, feature, result)
    true_weight, true_bias = exact(grad, feature)
    assert served and torch.equal(of_weight, true_weight.to(dtype)) and torch.equal(of_bias, true_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_error_against_float64(case: Case, dtype: torch.dtype) -> None:
    grad, feature = _maps(case, dtype)
    served, of_weight, of_bias = called(grad, feature)
    _, *eager = aten.gradients(grad, feature, None, True)
    assert served
    for ours, theirs, true in zip((of_weight, of_bias.to(dtype)), eager, exact(grad, feature), strict=True):
        assert oracle.no_worse_than_eager(ours, theirs, true)


@pytest.mark.nightly
@pytest.mark.parametrize("sign", ["any", "positive"])
def test_long_sums(sign: str) -> None:
    """A quarter of a million pixels; with one sign, the sum outgrows its terms."""
    grad, feature = (random_map((4, 16, 200, 320), torch.float32, layout="nhwc") for _ in range(2))
    if sign == "positive":
        grad, feature = grad.abs(), feature.abs()
    served, of_weight, _ = called(grad, feature)
    # 2,000 blocks of 32 tiles in sequence: as many random roundings of a growing sum.
    bound = 2000**0.5 * oracle.rounding(torch.float32)
    assert served and oracle.error(of_weight, exact(grad, feature)[0]) <= bound


@pytest.mark.parametrize("place", [(0, 0), (0, 18), (12, 0), (12, 18), (5, 8)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("spoilt", [0, 1], ids=["grad", "feature"])
def test_what_is_not_finite_shows_where_eager_has_it(spoilt: int, value: float, place: tuple[int, int]) -> None:
    """The transforms would spread such values, and large numbers would overflow: left to PyTorch."""
    maps = [random_map((2, channels, 13, 19), torch.float32, layout="nhwc") for channels in (20, 24)]
    maps[spoilt][0, 3, place[0], place[1]] = value
    maps[spoilt][0, 3, place[0] - 1, place[1] - 1] = value
    assert not called(maps[0], maps[1])[0]
    with fpn_kernels.use_backend("native"):
        ours = torch.ops.fpn_kernels.output_conv_backward_weight(*maps)
    _, *eager = aten.gradients(maps[0], maps[1], None, True)
    for result, theirs in zip(ours, eager, strict=True):
        finite = theirs.isfinite()
        assert torch.equal(finite, result.isfinite())
        torch.testing.assert_close(result[~finite], theirs[~finite], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(result[finite], theirs[finite], rtol=1e-4, atol=1e-3)


def test_the_same_bits_for_any_number_of_threads() -> None:
    grad, feature = _maps(Case(2, 90, 170, (37, 41)), torch.float32)
    results = []
    for count in (1, 2, 3, 7, 12):
        torch.set_num_threads(count)
        served, *result = called(grad, feature)
        assert served
        results.append(result)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_the_operator_takes_it_from_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delattr(aten, "gradient_of_weight")
    grad, feature = _maps(CASES[1], torch.float32)
    served, of_weight, of_bias = called(grad, feature)
    assert served
    for layouts in (torch.contiguous_format, torch.channels_last), (torch.contiguous_format, torch.contiguous_format):
        converted = [tensor.contiguous(memory_format=f) for tensor, f in zip((grad, feature), layouts, strict=True)]
        with fpn_kernels.use_backend("native"):
            ours = torch.ops.fpn_kernels.output_conv_backward_weight(*converted)
        assert torch.equal(ours[0], of_weight) and torch.equal(ours[1], of_bias.float())


# Calls left to PyTorch (it is faster, or there is no kernel), with the number of threads.
NOT_SERVED = {
    "float64": (Case(1, 32, 32, (20, 20)), torch.float64, "nhwc", 1),
    "NCHW, which the caller transposes": (Case(1, 32, 32, (20, 20)), torch.float32, "nchw", 1),
    "few channels": (Case(1, 15, 32, (20, 20)), torch.float32, "nhwc", 1),
    "few output channels": (Case(1, 32, 15, (20, 20)), torch.float32, "nhwc", 1),
    "few pixels": (Case(1, 32, 32, (14, 15)), torch.float32, "nhwc", 1),
    "no map": (Case(0, 32, 32, (20, 20)), torch.float32, "nhwc", 1),
    "more threads than units": (Case(1, 32, 32, (20, 20)), torch.float32, "nhwc", 3),
}


@pytest.mark.parametrize("reason", NOT_SERVED)
def test_a_call_left_to_pytorch_writes_nothing(reason: str) -> None:
    case, dtype, layout, count = NOT_SERVED[reason]
    torch.set_num_threads(count)
    maps = (random_map((case.batch, c, *case.size), dtype, layout=layout) for c in (case.cout, case.cin))
    served, of_weight, of_bias = called(*maps)
    assert not served and of_weight.isnan().all() and of_bias.isnan().all()


@pytest.mark.parametrize("level", [PORTABLE, AVX512], ids=LEVELS.get)
def test_other_isas_are_left_to_pytorch(level: int) -> None:
    if max(here()) < level:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    with limited(level):
        assert not called(*_maps(CASES[0], torch.float32))[0]
