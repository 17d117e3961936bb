"""The compiled library's gradient of the 3x3 weight by AMX tiles, called directly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import oracle
import pytest
import torch
from levels import AMX, PORTABLE, here, limited
from samples import LAYOUTS, random_map
from torch import Tensor

import fpn_kernels
from fpn_kernels import native
from fpn_kernels.operators import aten

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FORMAT_PAIRS = list(itertools.product(FORMATS, FORMATS))
DTYPE = torch.bfloat16


@pytest.fixture
def amx() -> None:
    if max(here()) < AMX:
        pytest.skip("this CPU has no AMX")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    batch: int
    cin: int
    cout: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.batch}x{self.cin}-to-{self.cout}-{self.size[0]}x{self.size[1]}"


CASES = [
    Case(1, 64, 64, (8, 31)),  # whole tiles, panels and steps of 32 positions, with the zero after each row
    Case(2, 9, 17, (7, 9)),  # tails in every dimension
    Case(1, 257, 33, (13, 10)),  # one channel after whole chunks, one after a panel
    Case(3, 33, 70, (40, 41)),  # many blocks over several maps; five tiles of output channels
    Case(1, 40, 33, (9, 30)),  # the distance of two rows plus one is a whole step
    Case(1, 31, 80, (3, 500)),  # rows longer than a block
    Case(5, 16, 24, (5, 3)),  # blocks that continue from map to map
    Case(1, 8, 20, (1, 75)),  # one row
    Case(1, 12, 40, (75, 1)),  # one column
    Case(2, 1, 1, (1, 1)),  # one channel, one pixel
]
# C5 of an 800 x 1280 image: several blocks
LARGE = pytest.param(Case(1, 256, 256, (25, 40)), marks=pytest.mark.nightly)


def whole_numbers(shape: tuple[int, ...], layout: str, dtype: torch.dtype = DTYPE) -> Tensor:
    """Small whole numbers, whose products and sums are exact in any order."""
    return (
        random_map(shape, dtype, layout=layout).clamp_(-3, 3).round_()
        if layout != "expanded"
        else (random_map((1, shape[1], 1, shape[3]), dtype).clamp_(-3, 3).round_().expand(shape))
    )


def exact(grad: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the oracle's aten, in float64."""
    leaves = [
        torch.zeros(grad.shape[1], feature.shape[1], 3, 3, dtype=torch.float64, requires_grad=True),
        torch.zeros(grad.shape[1], dtype=torch.float64, requires_grad=True),
    ]
    of_weight, of_bias = torch.autograd.grad(oracle.output_conv(feature, *leaves), leaves, grad.double())
    return of_weight, of_bias


def called(grad: Tensor, feature: Tensor, result: str = "nchw") -> tuple[bool, Tensor, Tensor]:
    """Whether the library computed the call, and its results, from larger memory full of NaN."""
    o, i = grad.shape[1], feature.shape[1]
    memory = torch.full((o * i * 9 + 70,), math.nan, dtype=grad.dtype)
    dense = memory[35:-35]
    of_weight = dense.view(o, 3, 3, i).permute(0, 3, 1, 2) if result == "nhwc" else dense.view(o, i, 3, 3)
    sums = torch.full((o + 16,), math.nan, dtype=torch.float64)
    of_bias = sums[8:-8]
    served = torch.ops.fpn_kernels_native.output_conv_backward_weight(grad, feature, of_weight, of_bias)
    path = torch.ops.fpn_kernels_native.output_conv_backward_weight_path(grad, feature)
    assert not (served and path == "convolution")
    assert memory[:35].isnan().all() and memory[-35:].isnan().all(), "written outside the result"
    assert sums[:8].isnan().all() and sums[-8:].isnan().all(), "written outside the bias"
    return served, of_weight, of_bias


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("result", ["nchw", pytest.param("nhwc", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("layouts", [*zip(LAYOUTS, LAYOUTS, strict=True), *FORMAT_PAIRS[1:3]], ids="-".join)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_whole_numbers_bit_for_bit(case: Case, layouts: tuple[str, str], result: str) -> None:
    """Each product of pixels is in its sum, and no other."""
    grad = whole_numbers((case.batch, case.cout, *case.size), layouts[0])
    feature = whole_numbers((case.batch, case.cin, *case.size), layouts[1])
    served, of_weight, of_bias = called(grad, feature, result)
    true_weight, true_bias = exact(grad, feature)
    assert served and torch.equal(of_weight, true_weight.to(DTYPE)) and torch.equal(of_bias, true_bias)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("layouts", FORMAT_PAIRS, ids="-".join)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_error_against_float64(case: Case, layouts: tuple[str, str]) -> None:
    grad = random_map((case.batch, case.cout, *case.size), DTYPE, layout=layouts[0])
    feature = random_map((case.batch, case.cin, *case.size), DTYPE, layout=layouts[1])
    served, of_weight, of_bias = called(grad, feature)
    _, *eager = aten.gradients(grad, feature, None, True)
    assert served
    for ours, theirs, true in zip((of_weight, of_bias.to(DTYPE)), eager, exact(grad, feature), strict=True):
        assert oracle.no_worse_than_eager(ours, theirs, true)


@pytest.mark.nightly
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("sign", ["any", "positive"])
def test_long_sums(sign: str) -> None:
    """Half a million pixels, summed in float32; with one sign, the sum outgrows its terms."""
    grad, feature = (random_map((8, 8, 200, 320), DTYPE, layout="nhwc") for _ in range(2))
    if sign == "positive":
        grad, feature = grad.abs(), feature.abs()
    served, of_weight, of_bias = called(grad, feature)
    padded = torch.nn.functional.pad(feature.double(), (1, 1, 1, 1))
    taps = [padded[:, :, y : y + 200, x : x + 320].transpose(0, 1).flatten(1) for y in range(3) for x in range(3)]
    lines = grad.double().transpose(0, 1).flatten(1)
    true = torch.stack([lines @ tap.t() for tap in taps], dim=2).view(8, 8, 3, 3)
    assert served
    # The error of the float32 sums is at most a tenth of the rounding to bfloat16.
    assert oracle.error(of_weight, true) <= 1.001 * oracle.error(true.to(DTYPE), true)
    assert oracle.error(of_bias, lines.sum(1)) <= 1e-6


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("layouts", FORMAT_PAIRS, ids="-".join)
def test_nothing_around_a_slice_is_read(layouts: tuple[str, str]) -> None:
    maps = []
    for channels, layout in zip((24, 20), layouts, strict=True):
        whole = torch.full((2, channels + 10, 15, 60), math.nan, dtype=DTYPE).contiguous(memory_format=FORMATS[layout])
        part = whole[:, 4 : channels + 4, 3:12, 20:57]
        part.copy_(whole_numbers((2, channels, 9, 37), "nchw"))
        maps.append(part)
    served, of_weight, of_bias = called(*maps)
    true_weight, true_bias = exact(*maps)
    assert served and torch.equal(of_weight, true_weight.to(DTYPE)) and torch.equal(of_bias, true_bias)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("place", [(0, 0), (0, 18), (12, 0), (12, 18), (0, 7), (5, 0), (5, 18), (6, 8)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoilt", [0, 1], ids=["grad", "feature"])
def test_what_is_not_finite_shows_where_eager_has_it(spoilt: int, value: float, place: tuple[int, int]) -> None:
    """Zero times infinity is NaN and the maps are padded with zeros, so such maps are left to PyTorch."""
    for layout in FORMATS:
        maps = [random_map((1, channels, 13, 19), DTYPE, layout=layout) for channels in (20, 24)]
        maps[spoilt][0, 3, place[0], place[1]] = value
        assert not called(maps[0], maps[1])[0]
        with fpn_kernels.use_backend("native"):
            ours = torch.ops.fpn_kernels.output_conv_backward_weight(*maps)
        _, *eager = aten.gradients(maps[0], maps[1], None, True)
        assert not eager[0].isfinite().all() and eager[0].isfinite().any()
        for result, theirs in zip(ours, eager, strict=True):
            torch.testing.assert_close(result, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("amx")
def test_subnormal_pixels_count_as_themselves_or_as_zero() -> None:
    """The tiles flush them to zero, like the forward; other results are not affected."""
    tiny = torch.finfo(DTYPE).smallest_normal / 4
    grad, feature = torch.full((1, 20, 6, 9), tiny, dtype=DTYPE), torch.ones(1, 8, 6, 9, dtype=DTYPE)
    served, of_weight, _ = called(grad, feature)
    assert served and (torch.equal(of_weight, torch.zeros_like(of_weight)) or of_weight.gt(0).all())
    grad[:, 5] = 1
    assert torch.equal(called(grad, feature)[1][5, :, 1, 1], torch.full((8,), 54.0, dtype=DTYPE))


@pytest.mark.usefixtures("amx", "threads")
@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_bits_for_any_number_of_threads(layout: str) -> None:
    grad, feature = (random_map((2, c, 37, 41), DTYPE, layout=layout) for c in (90, 70))
    results = []
    for count in (1, 1, 2, 3, 7):
        torch.set_num_threads(count)
        served, of_weight, of_bias = called(grad, feature, layout)
        assert served
        results.append((of_weight, of_bias))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.usefixtures("amx", "poisoned")
@pytest.mark.parametrize("layout", FORMATS)
def test_nothing_that_was_not_written_is_returned(layout: str) -> None:
    grad, feature = (whole_numbers((2, c, 9, 11), layout) for c in (90, 70))
    with fpn_kernels.use_backend("native"):
        ours = torch.ops.fpn_kernels.output_conv_backward_weight(grad, feature, memory_format=FORMATS[layout])
    for result, true in zip(ours, exact(grad, feature), strict=True):
        assert torch.equal(result, true.to(DTYPE))


# Calls left to PyTorch: it is faster, or there is no kernel.
NOT_SERVED: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], int]] = {
    "float32": (lambda: (torch.ones(1, 32, 8, 8), torch.ones(1, 32, 8, 8)), 1),
    "no map": (lambda: (torch.ones(0, 32, 8, 8, dtype=DTYPE), torch.ones(0, 32, 8, 8, dtype=DTYPE)), 1),
    "more threads than units": (
        lambda: (torch.ones(1, 32, 8, 8, dtype=DTYPE), torch.ones(1, 64, 8, 8, dtype=DTYPE)),
        3,
    ),
    "a wide map": (lambda: (torch.ones(1, 32, 1, 2049, dtype=DTYPE), torch.ones(1, 32, 1, 2049, dtype=DTYPE)), 1),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("reason", NOT_SERVED)
def test_a_call_left_to_pytorch_writes_nothing(reason: str) -> None:
    make, count = NOT_SERVED[reason]
    torch.set_num_threads(count)
    served, of_weight, of_bias = called(*make())
    assert not served and of_weight.isnan().all() and of_bias.isnan().all()


def test_it_needs_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    grad, feature = (random_map((1, 32, 8, 8), DTYPE) for _ in range(2))
    with limited(PORTABLE):
        served, of_weight, of_bias = called(grad, feature)
        with fpn_kernels.use_backend("native"):
            ours = torch.ops.fpn_kernels.output_conv_backward_weight(grad, feature)
    assert not served and of_weight.isnan().all() and of_bias.isnan().all()
    _, *eager = aten.gradients(grad, feature, None, True)
    assert all(map(torch.equal, ours, eager))


@pytest.mark.usefixtures("amx")
def test_the_backward_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(aten, "gradient_of_weight")
    monkeypatch.delattr(aten, "gradients")
    grad, feature = (random_map((1, 32, 48, 50), DTYPE, layout="nhwc") for _ in range(2))
    inputs = [feature, random_map((32, 32, 3, 3), DTYPE), grad[0, :, 0, 0].clone()]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ours = torch.autograd.grad(fpn_kernels.output_conv(*inputs), inputs, grad)
    served, of_weight, of_bias = called(grad, feature.detach())
    assert served and torch.equal(ours[1], of_weight) and torch.equal(ours[2], of_bias.to(DTYPE))
