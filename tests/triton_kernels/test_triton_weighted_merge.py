"""The Triton kernels of the weighted merge below their operators: every tile, every element written, int64 offsets."""

from __future__ import annotations

import itertools
import random
from typing import Any

import oracle
import pytest
import torch
from native_calls import by_triton, refusal_of
from samples import random_map
from targets import first_of_each

pytest.importorskip("triton", reason="Triton is not installed")

from fpn_kernels.gpu import geometry
from fpn_kernels.operators.weighted_merge import triton as weighted_merge

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FACTORS = [0.3, -0.9, 1.7]
TILES = first_of_each(weighted_merge.TABLE)
BACKWARD_TILES = first_of_each(weighted_merge.BACKWARD_TABLE)
# How the last map is read -> a size of it, one of the result and a mode; odd, and not one tile wide.
SIZES_READ = {
    "same": ((5, 37), (5, 37), "bilinear"),
    "pairs": ((3, 19), (6, 38), "nearest"),
    "nearest": ((2, 15), (5, 37), "nearest-exact"),
    "bilinear": ((2, 15), (3, 35), "bilinear"),
}
interpreted = pytest.mark.interpreter


def _poisoned(shape: torch.Size, dtype: torch.dtype, walk: str) -> torch.Tensor:
    layout = torch.channels_last if walk == "channels" else torch.contiguous_format
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=layout)


def _dtype_of(element_size: int) -> torch.dtype:
    return torch.float32 if element_size == 4 else random.choice([torch.float16, torch.bfloat16])


@interpreted
@pytest.mark.parametrize(("key", "tile"), TILES, ids=str)
def test_every_tile(key: tuple[str, str, int], tile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, reading, element_size = key
    monkeypatch.setattr(weighted_merge, "choose", lambda *arguments: tile)
    coarse, size, mode = SIZES_READ[reading]
    dtype = _dtype_of(element_size)
    # Two maps, and three with the last one in either place, in each layout.
    cases = list(itertools.product((False, True), FORMATS, FORMATS))
    # Of two maps the last has the second weight.
    places = [1] * 4 + [1, 2, 2, 1]
    ways = itertools.cycle((("none", 0.0), ("relu", 0.5), ("softmax", 0.5)))
    for (third, one, other), last_factor, (normalization, eps) in list(zip(cases, places, ways, strict=False))[::3]:
        first, middle = (random_map((2, 5, *size), dtype, layout=layout) for layout in (one, other))
        last = random_map((2, 5, *coarse), dtype, layout=other)
        out = _poisoned(first.shape, dtype, walk)
        weights = torch.tensor(FACTORS if third else FACTORS[:2])
        call = (first, middle if third else None, last, last_factor, out, mode, normalization, eps)
        weighted_merge.plan_merge(*call)(first, middle if third else first, last, weights, out)
        factors = oracle.fusion_factors(weights, normalization, eps)
        order = [0, 3 - last_factor, last_factor] if third else [0, last_factor]
        maps = [first, middle, last] if third else [first, last]
        spread = max(size) if reading == "bilinear" else 1
        oracle.within_rounding(out, oracle.weighted_merge(maps, factors[order], mode), 8.0 * spread)


@interpreted
@pytest.mark.parametrize(("key", "tile"), BACKWARD_TILES, ids=str)
def test_every_tile_of_the_backward(key: tuple[str, int], tile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, element_size = key
    monkeypatch.setattr(weighted_merge, "choose_backward", lambda *arguments: tile)
    dtype = _dtype_of(element_size)
    for one, other in itertools.product(FORMATS, FORMATS):
        grad, tensor = (random_map((2, 5, 7, 37), dtype, layout=layout) for layout in (one, other))
        out = _poisoned(grad.shape, dtype, walk)
        scale, programs = weighted_merge.plan_backward(grad, tensor, out)
        partials = torch.full((programs,), float("nan"))
        scale(grad, tensor, torch.tensor(-0.7), out, partials)
        oracle.within_rounding(out, -0.7 * grad.double(), grad.double().abs())
        products = grad.double() * tensor.double()
        oracle.within_rounding(partials.double().sum().float(), products.sum(), 4 * products.abs().sum())


def _all_results(layout: str) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x, y = (random_map((2, 5, 8, 6), torch.float32, layout=layout) for _ in range(2))
    half, uneven = (random_map((2, 5, *size), torch.float32, layout=layout) for size in ((4, 3), (3, 5)))
    factors = torch.tensor(FACTORS)
    results = [*by_triton("weighted_merge_backward", x, y, factors[1])]
    for mode, last in itertools.product(("nearest", "bilinear"), (y, half, uneven)):
        results += [
            by_triton("weighted_merge", x, last, None, factors[:2], mode),
            by_triton("weighted_merge", x, y, last, factors, mode),
            by_triton("weighted_merge", x, last, y, factors, mode),
        ]
    return results


@interpreted
@pytest.mark.parametrize("layout", FORMATS)
def test_int64_offsets_give_the_same_results(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _all_results(layout)
    monkeypatch.setattr(geometry, "needs_int64", lambda *tensors: True)
    assert all(map(torch.equal, _all_results(layout), expected))


@interpreted
def test_reasons_to_refuse() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, dtype=dtype).expand(shape)

    def reason(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor | None = None) -> str | None:
        return refusal_of("triton", "weighted_merge", first, second, third, torch.ones(3))

    small, coarse = empty(1, 1, 4, 4), empty(1, 1, 2, 2)
    assert reason(small, coarse) is None and reason(small, coarse, small) is None
    assert "two maps to be resized" in str(reason(small, coarse, coarse))
    assert "float64" in str(reason(small.double(), coarse.double()))
    assert "side of 1048577 pixels" in str(reason(small, small, empty(1, 1, 2**20 + 1, 1)))
    assert "image rows" in str(reason(*[empty(1, 2**14, 2**16, 4)] * 2))
    factor = torch.tensor(1.0)
    assert refusal_of("triton", "weighted_merge_backward", small, small, factor) is None
    assert "2**30 pixels" in str(
        refusal_of("triton", "weighted_merge_backward", *[empty(1, 1, 2**15, 2**15)] * 2, factor)
    )
    assert "image rows" in str(
        refusal_of("triton", "weighted_merge_backward", *[empty(1, 2**14, 2**16, 4)] * 2, factor)
    )
