"""The Triton kernels below the operators: every tile of every table, every element written, offsets in int64.

The operator tests reach the kernels with the tile that the heuristics choose; here the tile is forced, and results are
poisoned before they are written.  `make test` takes one tile of each kernel, the nightly tests take all of them.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import oracle
import pytest
import torch
from native_calls import by_triton, refusal_of
from samples import random_map
from targets import first_of_each

pytest.importorskip("triton", reason="Triton is not installed")

from fpn_kernels import resampling
from fpn_kernels.gpu import availability, geometry
from fpn_kernels.operators.lateral_connection import triton as lateral_connection
from fpn_kernels.operators.upsample_add import triton as upsample_add
from fpn_kernels.operators.upsample_add import triton_backward as upsample_add_backward

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PAIRS_OF_LAYOUTS = list(itertools.product(FORMATS, FORMATS))
interpreted, nightly = pytest.mark.interpreter, pytest.mark.nightly


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=FORMATS[layout])


def _layout_of(walk: str) -> str:
    return "nhwc" if walk == "channels" else "nchw"


def _dtype_of(element_size: int) -> torch.dtype:
    return torch.float32 if element_size == 4 else random.choice([torch.float16, torch.bfloat16])


def _close(result: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | float) -> None:
    """Within one rounding of the result and a few of the float32 sums of `terms`."""
    assert torch.isfinite(result).all(), "an element was not written"
    bound = oracle.rounding(result.dtype) * exact.abs() * 1.001 + 32 * torch.finfo(torch.float32).eps * terms
    bound = bound + torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    excess = (result.double() - exact).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float(excess.max())} more than rounding allows"


def _connect(
    feature: torch.Tensor, weight: torch.Tensor, bias: Any, top: Any, out: torch.Tensor, mode: str, gain: float = 0.7
) -> None:
    lateral_connection.plan_connection(feature, weight, bias, top, out, mode)(feature, weight, bias, top, out, gain)


# --------------------------------------------------------------------------------------- every tile of every table

FORWARD_TILES = first_of_each(upsample_add.TABLE)
BACKWARD_TILES = first_of_each(upsample_add_backward.TABLE)
SIZES_READ = {  # how the top is read -> a size of it and one of the result; odd, and not one tile wide
    "pairs": ((3, 19), (6, 38)),
    "nearest": ((2, 15), (5, 37)),
    "bilinear": ((2, 15), (3, 35)),
}
SIZES_GATHERED = {  # window, mode -> the same for the gradient
    (upsample_add_backward.PAIRS, "nearest"): ((3, 37), (6, 74)),
    (2, "nearest-exact"): ((2, 35), (3, 61)),
    (4, "nearest"): ((2, 9), (7, 33)),
    (4, "bilinear"): ((2, 9), (3, 17)),
    (upsample_add_backward.AREA, "nearest-exact"): ((2, 1), (7, 70)),
    (upsample_add_backward.AREA, "bilinear"): ((1, 2), (3, 70)),
}


@interpreted
@pytest.mark.parametrize(("key", "tile"), FORWARD_TILES, ids=str)
def test_every_tile_of_upsample_add(key: tuple[str, str, int], tile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, reading, element_size = key
    monkeypatch.setattr(upsample_add, "choose", lambda *arguments: tile)
    mode = "nearest-exact" if reading == "nearest" else "nearest" if reading == "pairs" else "bilinear"
    top_size, size = SIZES_READ[reading]
    dtype = _dtype_of(element_size)
    for layouts in PAIRS_OF_LAYOUTS:
        top = random_map((2, 5, *top_size), dtype, layout=layouts[0])
        lateral = random_map((2, 5, *size), dtype, layout=layouts[1])
        out = _poisoned(lateral.shape, dtype, _layout_of(walk))
        upsample_add.plan_merge(top, lateral, out, mode)(top, lateral, out, 0.7)
        _close(out, oracle.upsample_add(top, lateral, mode, 0.7), 8 * max(top_size))


@interpreted
@pytest.mark.parametrize(("key", "tile"), BACKWARD_TILES, ids=str)
def test_every_tile_of_the_gathers(key: tuple[str, int, int], tile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, window, element_size = key
    monkeypatch.setattr(upsample_add_backward, "choose", lambda *arguments: tile)
    dtype = _dtype_of(element_size)
    cases = [(mode, sizes) for (cases_window, mode), sizes in SIZES_GATHERED.items() if cases_window == window]
    for (mode, (top_size, size)), layout in itertools.product(cases, FORMATS):
        grad = random_map((2, 5, *size), dtype, layout=layout)
        out = _poisoned((2, 5, *top_size), dtype, _layout_of(walk))
        plan = upsample_add_backward.plan_gather(grad, out, mode, bias=True)
        assert (plan.walk, plan.window) == (walk, window)
        partials = torch.full((plan.partials, 5), float("nan"))
        # With and without another gradient of the top.
        own = (
            random_map(out.shape, dtype, layout=_layout_of(walk))
            if layout == "nhwc" and window != upsample_add_backward.AREA
            else None
        )
        gather = upsample_add_backward.gather(plan, grad, out, mode, bias=True, upstream=own is not None)
        gather(grad, out, out if own is None else own, partials, 0.7)
        rows, columns = (oracle.resize_matrix(a, b, mode) for a, b in zip(top_size, size, strict=True))
        exact = torch.einsum("yh,ncyx,xw->nchw", rows, grad.double(), columns)
        terms = torch.einsum("yh,ncyx,xw->nchw", rows, grad.double().abs(), columns)
        rest = torch.zeros(()) if own is None else own.double()
        _close(out, 0.7 * exact + rest, terms * max(size) + rest.abs())
        # The partial sums are unscaled; each is written, and together they cover the map.
        _close(partials.double().sum(0).float(), grad.double().sum((0, 2, 3)), grad.double().abs().sum((0, 2, 3)))


@interpreted
@pytest.mark.parametrize(
    "key",
    # A kernel per arithmetic; the tiles differ in sizes alone.
    [pytest.param(k, id="-".join(k), marks=() if k[1] == "small" else nightly) for k in lateral_connection.TABLE],
)
def test_every_tile_of_lateral_connection(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic, _ = key
    dtype = _dtype_of(2 if arithmetic == "half" else 4)
    monkeypatch.setattr(lateral_connection, "choose", lambda *arguments: lateral_connection.TABLE[key])
    monkeypatch.setattr(geometry, "arithmetic_of", lambda feature: arithmetic)
    transposed = itertools.cycle((False, True))
    for feature_layout, top_layout, out_layout in itertools.product(FORMATS, repeat=3):
        feature = random_map((1, 35, 7, 11), dtype, layout=feature_layout)
        weight = random_map((1, 1, 35, 69), dtype)[0, 0].t() / 6 if next(transposed) else None
        weight = random_map((1, 1, 69, 35), dtype)[0, 0] / 6 if weight is None else weight
        bias = random_map((1, 1, 69, 2), dtype)[0, 0, :, 0]
        top = random_map((1, 69, 3, 5), dtype, layout=top_layout)
        out = _poisoned((1, 69, 7, 11), dtype, out_layout)
        _connect(feature, weight, bias, top, out, "nearest")
        _close(out, oracle.lateral_connection(feature, weight, bias, top, "nearest", 0.7), 32.0)
        out.fill_(float("nan"))
        _connect(feature, weight, None, None, out, "nearest")
        _close(out, oracle.lateral_connection(feature, weight), 32.0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("top_size", [(4, 8), (3, 5), pytest.param((5, 16), marks=nightly)], ids=str)
def test_pairs_of_pixels_read_one_coarse_pixel(top_size: tuple[int, int], dtype: torch.dtype) -> None:
    """NCHW results at ratio 2: tiles that end within a row, rows of any count, and tops of any strides."""
    size = (2 * top_size[0], 2 * top_size[1])
    wide = random_map((2, 37, top_size[0], 2 * top_size[1] + 1), dtype)
    tops = [random_map((2, 37, *top_size), dtype, layout=layout) for layout in FORMATS]
    for top in (*tops, wide[..., 1::2], wide[..., : top_size[1]], tops[0][:1].expand(2, -1, -1, -1)):
        feature, weight = random_map((2, 20, *size), dtype), random_map((1, 1, 37, 20), dtype)[0, 0] / 4
        out = _poisoned((2, 37, *size), dtype, "nchw")
        _connect(feature, weight, None, top, out, "nearest-exact")
        _close(out, oracle.lateral_connection(feature, weight, None, top, "nearest-exact", 0.7), 32.0)


# ----------------------------------------------------------------------------------------------------- int64 offsets


def _all_results(layout: str) -> list[torch.Tensor]:
    torch.manual_seed(1)
    top, lateral = random_map((2, 5, 4, 3), torch.float32, layout=layout), random_map((2, 5, 8, 6), torch.float32)
    uneven = random_map((2, 5, 7, 5), torch.float32, layout=layout)
    feature, weight = random_map((2, 9, 8, 6), torch.float32, layout=layout), torch.randn(5, 9)
    results = [by_triton("lateral_connection", feature, weight, torch.randn(5), top, "nearest", 0.5, None)]
    for mode in resampling.MODES:
        results += [
            by_triton("upsample_add", top, lateral, mode, 0.5),
            by_triton("upsample_add", top, uneven, mode, 1.0),
        ]
        for grad, size in ((lateral, (4, 3)), (uneven, (4, 3)), (uneven, (1, 1))):
            results += [*by_triton("merge_backward", grad, size, None, mode, 0.5)]
    return results


@interpreted
@pytest.mark.parametrize("layout", FORMATS)
def test_int64_offsets_give_the_same_results(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _all_results(layout)
    monkeypatch.setattr(geometry, "needs_int64", lambda *tensors: True)
    assert all(map(torch.equal, _all_results(layout), expected))


def test_int64_offsets_where_any_tensor_reaches_beyond_int32() -> None:
    def shaped(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.float16)

    small = shaped(2, 3, 4, 5)
    assert not geometry.needs_int64(small)
    assert not geometry.needs_int64(shaped(1, 2**15, 2**8, 2**8))  # its last offset is 2**31 - 1
    assert geometry.needs_int64(small, shaped(1, 2**15, 2**8, 2**8 + 1))
    # A view of a few elements that lie far apart; and one whose large strides are never taken.
    assert geometry.needs_int64(shaped(3, 2**15, 2**8, 2**8)[::2, ::2, :1, :1])
    assert not geometry.needs_int64(shaped(3, 2**15, 2**8, 2**8)[:1, :5])


# --------------------------------------------------------------------------------------------- ranges, determinism


@interpreted
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_every_fine_pixel_is_gathered_once_and_by_its_own_source(mode: str) -> None:
    """Integers, summed exactly: the ranges must invert the forward's float32 indices at uneven pairs too."""
    pairs = [(30, 58), (116, 230), (75, 150), (7, 7), (9, 4), (1, 50)]
    # Here the estimate of a range's start is two pixels short (found by search).
    pairs.append((15991, 16069) if mode == "nearest" else (5779, 9777))
    for in_size, out_size in pairs:
        grad = torch.arange(1.0, out_size + 1).view(1, 1, 1, out_size)
        result = by_triton("upsample_add_backward", grad, (1, in_size), mode, 1.0)
        source = torch.tensor(oracle.nearest_index(in_size, out_size, mode))
        expected = torch.zeros(in_size).index_add_(0, source, grad.flatten())
        assert torch.equal(result.flatten(), expected), (in_size, out_size)


@pytest.mark.parametrize("mode", resampling.MODES)
def test_longest_window_is_exact(mode: str) -> None:
    for in_size, out_size in [(30, 58), (57, 113), (8, 16), (9, 4), (1, 50), (5, 5), (3, 10), (116, 230)]:
        weights = oracle.resize_matrix(in_size, out_size, mode)
        longest = geometry.longest_window(in_size, out_size, mode)
        # Bilinear windows may begin or end with a pixel of weight zero, and every pixel that counts is inside.
        spare = 2 if mode == "bilinear" else 0
        assert 0 <= longest - int((weights != 0).sum(0).max()) <= spare


# ----------------------------------------------------------------------------------------------- choices and refusals


def test_alignment() -> None:
    nchw, nhwc = torch.empty(2, 24, 6, 20), torch.empty(2, 24, 6, 20).contiguous(memory_format=torch.channels_last)
    assert geometry.alignment(nhwc, 1, 24) == 8 and geometry.alignment(nchw, 3, 20) == 4
    assert geometry.alignment(nchw, 1, 24) == 0 and geometry.alignment(nhwc, 3, 20) == 0
    assert geometry.alignment(nhwc[:, :9], 1, 9) == 1
    # The second image of a slice starts as far off as the first: whole vectors only from a 16-byte start.
    assert geometry.alignment(nhwc[:, 1:17], 1, 16) == 1 and geometry.alignment(nhwc[:, 4:20], 1, 16) == 8
    # Strides of single pixels, which PyTorch leaves arbitrary, do not count.
    assert geometry.alignment(torch.empty(1, 16, 1, 1).as_strided((1, 16, 1, 1), (7, 1, 3, 5)), 1, 16) == 16


def test_the_bias_leaves_few_partial_sums() -> None:
    """At the paper's largest level: less than two percent of the gradient's own bytes."""
    for batch, layout in itertools.product((1, 8), FORMATS):
        grad, out = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=FORMATS[layout])
            for shape in ((batch, 256, 200, 320), (batch, 256, 100, 160))
        )
        plan = upsample_add_backward.plan_gather(grad, out, "nearest", bias=True)
        assert plan.partials * 256 * 4 < 0.02 * grad.numel() * 2


@interpreted
def test_reasons_to_refuse() -> None:
    def lateral(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, dtype=dtype).expand(shape)

    def upsample(top: torch.Tensor, fine: torch.Tensor) -> str | None:
        return refusal_of("triton", "upsample_add", top, fine)

    assert upsample(lateral(1, 1, 2, 2), lateral(1, 1, 4, 4)) is None
    for top, fine, reason in (
        (lateral(1, 1, 2, 2, dtype=torch.float64), lateral(1, 1, 4, 4, dtype=torch.float64), "float64"),
        (lateral(1, 1, 2, 2), lateral(1, 1, 4, 2**20 + 1), "side of 1048577 pixels"),
        (lateral(1, 2**14, 2, 2), lateral(1, 2**14, 2**17, 4), "image rows"),
    ):
        assert reason in str(upsample(top, fine))
    feature, weight = lateral(1, 1, 2**15, 2**15), lateral(1, 1)
    assert "2**30 pixels" in str(refusal_of("triton", "lateral_connection", feature, weight, None, None))
    assert refusal_of("triton", "lateral_connection", feature[..., 1:], weight, None, None) is None


@pytest.mark.skipif(availability.INTERPRETED, reason="the interpreter serves CPU tensors")
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    maps = torch.empty(1, 1, 2, 2), torch.empty(1, 1, 4, 4)
    assert refusal_of("triton", "upsample_add", *maps) == "serves CUDA tensors, not cpu"


def test_too_old_a_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_triton_version", lambda: "3.5.1")
    assert availability.unavailable() == "Triton 3.5.1 is older than 3.6"
    monkeypatch.setattr(availability, "_triton_version", lambda: None)
    assert availability.unavailable() == "Triton is not installed"


def test_importing_the_backend_does_not_import_triton() -> None:
    code = "import sys, fpn_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
