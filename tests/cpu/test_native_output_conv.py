"""The compiled library's 3x3 convolutions, by Winograd's minimal filtering and by AMX tiles, called directly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from levels import AMX, AVX2, AVX512, LEVELS, PORTABLE, here, limited
from samples import LAYOUTS, random_map
from torch import Tensor

from fpn_kernels import native

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FORMAT_PAIRS = list(itertools.product(FORMATS, FORMATS))


def _served(feature: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    served: bool = torch.ops.fpn_kernels_native.output_conv(feature, weight, bias, out)
    assert served == (torch.ops.fpn_kernels_native.output_conv_path(feature, weight) != "convolution")
    return served


def _on(level: int) -> Iterator[None]:
    if max(here()) < level:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    with limited(level):
        yield


@pytest.fixture(params=[AVX2, AVX512], ids=LEVELS.get)
def floats(request: pytest.FixtureRequest) -> Iterator[None]:
    """The ISAs that multiply float32."""
    yield from _on(request.param)


# The ISAs that multiply each dtype.
PRODUCTS = {
    torch.float32: (AVX2, AVX512),
    torch.float16: (AVX2, AVX512),
    torch.bfloat16: (AVX2, AMX),
}


@pytest.fixture(
    params=[(dtype, level) for dtype, levels in PRODUCTS.items() for level in levels],
    ids=lambda pair: f"{pair[0]}-{LEVELS[pair[1]]}",
)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype, on an ISA that multiplies it."""
    dtype, level = request.param
    for _ in _on(level):
        yield dtype


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
    Case(1, 64, 64, (8, 32)),  # whole tiles, groups of tiles, panels and chains of sums
    Case(2, 9, 17, (7, 9)),  # tails in every dimension
    Case(1, 257, 33, (13, 10)),  # one channel after whole vectors and chains, one after a panel
    Case(1, 31, 80, (19, 29)),  # C5 of a 600 x 900 image, half a panel
    Case(5, 16, 24, (5, 3)),  # blocks that continue from map to map
    Case(1, 8, 20, (2, 75)),  # one line of tiles, in several groups
    Case(1, 12, 40, (75, 2)),  # one column of tiles
    Case(1, 500, 32, (9, 20)),  # more channels, fewer tiles in a block, a tail of four in every sum
]
# C5 of an 800 x 1280 image
LARGE = Case(1, 256, 256, (25, 40))


def _operands(case: Case, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    feature = random_map((case.batch, case.cin, *case.size), dtype, layout=layout)
    weight = random_map((case.cout, case.cin, 3, 3), dtype) / (3 * case.cin**0.5)
    return feature, weight, random_map((1, case.cout, 1, 1), dtype).flatten()


def _poisoned(case: Case, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """A dense result, and the larger memory full of NaN around it."""
    n, c, (h, w) = case.batch, case.cout, case.size
    memory = torch.full((n * c * h * w + 70,), math.nan, dtype=dtype)
    dense = memory[35:-35]
    return (dense.view(n, h, w, c).permute(0, 3, 1, 2) if layout == "nhwc" else dense.view(n, c, h, w)), memory


# In `make test` the cases take the layouts in turn.
PLACED = [
    pytest.param(
        case,
        layout,
        result,
        id=f"{case}-{layout}-{result}",
        marks=() if (i - j) % len(LAYOUTS) == 0 and (i - k) % len(FORMATS) == 0 else pytest.mark.nightly,
    )
    for i, case in enumerate(CASES)
    for j, layout in enumerate(LAYOUTS)
    for k, result in enumerate(FORMATS)
]


@pytest.mark.parametrize(
    ("case", "layout", "result"), [*PLACED, pytest.param(LARGE, "nhwc", "nchw", marks=pytest.mark.nightly)]
)
def test_values(case: Case, dtype: torch.dtype, layout: str, result: str) -> None:
    feature, weight, bias = _operands(case, dtype, layout)
    for given in (bias, None):
        out, memory = _poisoned(case, dtype, result)
        assert _served(feature, weight, given, out)
        eager = F.conv2d(feature, weight, given, padding=1)
        assert oracle.no_worse_than_eager(out, eager, oracle.output_conv(feature, weight, given))
        assert memory[:35].isnan().all() and memory[-35:].isnan().all()


@pytest.mark.parametrize("formats", FORMAT_PAIRS, ids="-".join)
def test_nothing_around_a_slice_is_read(formats: tuple[str, str], dtype: torch.dtype) -> None:
    case = Case(2, 20, 24, (9, 37))
    feature, weight, bias = _operands(case, dtype, "nchw")
    whole = torch.full((2, 30, 15, 60), math.nan, dtype=dtype).contiguous(memory_format=FORMATS[formats[0]])
    part = whole[:, 4:24, 3:12, 20:57]
    part.copy_(feature)
    out, _ = _poisoned(case, dtype, formats[1])
    assert _served(part, weight, bias, out)
    assert oracle.no_worse_than_eager(
        out, F.conv2d(feature, weight, bias, padding=1), oracle.output_conv(feature, weight, bias)
    )


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nhwc": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed, as the feature's gradient has it": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed nhwc": lambda w: w.transpose(0, 1).contiguous(memory_format=torch.channels_last).transpose(0, 1),
    "sliced": lambda w: torch.cat((w, w), 1).repeat_interleave(2, dim=3)[:, : w.shape[1], :, ::2],
    "taps transposed": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda w: w[:, :1].expand_as(w),
}


@pytest.mark.parametrize("layout", WEIGHTS)
def test_weights_of_any_strides(layout: str, dtype: torch.dtype) -> None:
    case = Case(1, 40, 50, (6, 10))
    feature, weight, bias = _operands(case, dtype, "nchw")
    strided = WEIGHTS[layout](weight)
    # A bias with a stride, too.
    bias = torch.stack((bias, bias), 1).flatten()[::2]
    ours, dense = (_poisoned(case, dtype, "nchw")[0] for _ in range(2))
    assert _served(feature, strided, bias, ours)
    assert _served(feature, strided.clone(memory_format=torch.contiguous_format), bias.clone(), dense)
    assert torch.equal(ours, dense)
    exact = oracle.output_conv(feature, strided, bias)
    assert oracle.no_worse_than_eager(ours, F.conv2d(feature, strided, bias, padding=1), exact)


DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a rectified feature": (torch.relu, lambda w: w),
    "positive weights": (lambda f: f, torch.abs),
    "all positive": (torch.abs, torch.abs),
    "an offset": (lambda f: f + 3, lambda w: w),
    "heavy tails": (lambda f: f**5, lambda w: w**3),
}


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("channels", [32, 64, 256])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_errors_of_other_distributions(distribution: str, channels: int) -> None:
    """The worst case of the transforms is weights of one sign: the sixteen sums nearly cancel."""
    case = Case(1, channels, 64, (24, 36))
    feature, weight, _ = _operands(case, torch.float32, "nchw")
    feature, weight = (change(t) for change, t in zip(DISTRIBUTIONS[distribution], (feature, weight), strict=True))
    out, _ = _poisoned(case, torch.float32, "nchw")
    assert _served(feature, weight, None, out)
    exact = oracle.output_conv(feature, weight)
    assert oracle.no_worse_than_eager(out, F.conv2d(feature, weight, padding=1), exact)


def _place(values: list[float], every: int) -> Callable[[Tensor], None]:
    def place(tensor: Tensor) -> None:
        for start, value in enumerate(values):
            tensor.view(-1)[start * 13 :: every] = value

    return place


SPECIAL: dict[str, tuple[Callable[[Tensor], None], Callable[[Tensor], None]]] = {
    "infinite pixels": (_place([math.inf], 997), lambda w: None),
    "both infinities": (_place([math.inf, -math.inf], 691), lambda w: None),
    "NaN": (_place([math.nan], 997), lambda w: None),
    "infinite pixels and zero weights": (_place([math.inf], 997), _place([0.0], 7)),
    "infinite weights, which the padding shows": (lambda f: None, _place([math.inf], 1001)),
    "NaN in a weight": (lambda f: None, _place([math.nan], 3001)),
    "nothing finite": (_place([math.nan], 1), lambda w: None),
}


@pytest.mark.parametrize("formats", FORMAT_PAIRS, ids="-".join)
@pytest.mark.parametrize("special", SPECIAL)
def test_infinities_and_nan_come_out_where_eager_has_them(
    special: str, formats: tuple[str, str], dtype: torch.dtype
) -> None:
    case = Case(1, 24, 20, (13, 35))
    feature, weight, bias = _operands(case, dtype, "nchw")
    for tensor, place in zip((feature, weight), SPECIAL[special], strict=True):
        place(tensor)
    feature = feature.contiguous(memory_format=FORMATS[formats[0]])
    out, _ = _poisoned(case, dtype, formats[1])
    out.zero_()
    assert _served(feature, weight, bias, out)
    eager = F.conv2d(feature, weight, bias, padding=1)
    finite = eager.isfinite()
    assert not finite.all()
    torch.testing.assert_close(out[~finite], eager[~finite], rtol=0, atol=0, equal_nan=True)
    exact = oracle.output_conv(feature, weight, bias)
    assert oracle.no_worse_than_eager(out[finite], eager[finite], exact[finite])


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("layout", FORMATS)
def test_sums_that_fit_do_not_overflow(layout: str) -> None:
    """Pixels of up to 3e38: the transforms add four of them, and the results are small."""
    case = Case(1, 24, 20, (13, 18))
    feature, weight, _ = _operands(case, torch.float32, "nchw")
    feature = (feature.clamp(-3, 3) * 1e38).contiguous(memory_format=FORMATS[layout])
    weight /= 100
    assert not (feature[..., 2:] - feature[..., :-2]).isfinite().all()
    out, _ = _poisoned(case, torch.float32, layout)
    assert _served(feature, weight, None, out)
    exact = oracle.output_conv(feature, weight)
    assert oracle.no_worse_than_eager(out, F.conv2d(feature, weight, padding=1), exact)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_bits_for_any_number_of_threads(layout: str, dtype: torch.dtype) -> None:
    case = Case(3, 70, 40, (17, 21))
    feature, weight, bias = _operands(case, dtype, layout)
    feature[0, 3, 5, 7] = math.inf
    results = []
    for count in (1, 1, 2, 3, 7):
        torch.set_num_threads(count)
        out, _ = _poisoned(case, dtype, layout)
        assert _served(feature, weight, bias, out)
        results.append(out)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


# Calls left to PyTorch: it is faster, or there is no kernel.
NOT_SERVED = {
    "float64": (Case(1, 32, 32, (8, 8)), torch.float64),
    "few output channels": (Case(1, 32, 16, (8, 8)), torch.float32),
    "few input channels": (Case(1, 7, 32, (8, 8)), torch.float32),
    "many input channels": (Case(1, 513, 32, (8, 8)), torch.float32),
    "few pixels": (Case(1, 32, 32, (5, 6)), torch.float32),
    "few pixels of float16": (Case(1, 32, 32, (1, 7)), torch.float16),
    "one row": (Case(1, 32, 32, (1, 64)), torch.float32),
    "one column": (Case(1, 32, 32, (64, 1)), torch.float32),
    "no map": (Case(0, 32, 32, (8, 8)), torch.float32),
    "no input channel": (Case(1, 0, 32, (8, 8)), torch.float16),
    "no input channel of bfloat16": (Case(1, 0, 32, (8, 8)), torch.bfloat16),
    "no map of bfloat16": (Case(0, 32, 32, (8, 8)), torch.bfloat16),
}


def _untouched(case: Case, dtype: torch.dtype) -> bool:
    feature, weight, bias = torch.ones(case.batch, case.cin, *case.size), torch.ones(case.cout, case.cin, 3, 3), None
    out, memory = _poisoned(case, dtype, "nchw")
    return not _served(feature.to(dtype), weight.to(dtype), bias, out) and bool(memory.isnan().all())


@pytest.mark.parametrize("reason", NOT_SERVED)
def test_a_call_left_to_pytorch_writes_nothing(reason: str) -> None:
    case, dtype = NOT_SERVED[reason]
    assert _untouched(case, dtype)


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_it_needs_vectors(dtype: torch.dtype) -> None:
    with limited(PORTABLE):
        assert _untouched(CASES[0], dtype)


def test_bfloat16_is_left_to_pytorch_where_there_are_vectors_and_no_tiles() -> None:
    with limited(AVX512) as level:
        assert _untouched(CASES[0], torch.bfloat16) == (level == AVX512)
