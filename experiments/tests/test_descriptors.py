"""`lateral_connection` over tensor descriptors, below the operator, against float64; run under the interpreter."""

from __future__ import annotations

import itertools
import random

import oracle
import pytest
import torch
from samples import random_map
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fpn_kernels.backends.triton import (
    descriptor_convolution,
    eligibility,
    geometry,
    lateral_connection,
    lateral_connection_descriptors,
)

interpreted = pytest.mark.interpreter
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TABLE = lateral_connection_descriptors.TABLE


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=FORMATS[layout])


def _weight(out_channels: int, in_channels: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    shape = (1, 1, in_channels, out_channels) if transposed else (1, 1, out_channels, in_channels)
    weight = (random_map(shape, torch.float64)[0, 0] / in_channels**0.5).to(dtype)
    return weight.t() if transposed else weight


def _close(result: Tensor, exact: Tensor) -> None:
    """Within one rounding of the result and a few of the float32 sum."""
    assert torch.isfinite(result).all(), "an element was not written"
    bound = oracle.rounding(result.dtype) * exact.abs() * 1.001 + 64 * torch.finfo(torch.float32).eps
    excess = (result.double() - exact).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float(excess.max())} more than rounding allows"


def _dtype_of(arithmetic: str) -> torch.dtype:
    return random.choice([torch.float16, torch.bfloat16]) if arithmetic == "half" else torch.float32


@interpreted
@pytest.mark.parametrize("key", TABLE, ids="-".join)
def test_every_tile(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than a box, more channels than a tile and a step; tops by boxes and gathered; every layout."""
    arithmetic, _ = key
    config, dtype = TABLE[key], _dtype_of(arithmetic)
    monkeypatch.setattr(geometry, "arithmetic_of", lambda feature: arithmetic)
    monkeypatch.setattr(geometry, "_DEFAULT_PROCESSORS", 3)
    monkeypatch.setattr(descriptor_convolution, "_PACKED_ROWS", 64)  # other tests are about these launches
    height, width = config.rows + 2, config.columns + 16
    in_channels, out_channels = config.depth + 8, config.channels + 8
    transposed = itertools.cycle((False, True))
    readings = set()
    for layouts in itertools.product(FORMATS, repeat=2):
        feature = random_map((1, in_channels, height, width), dtype, layout=layouts[0])
        weight = _weight(out_channels, in_channels, dtype, next(transposed))
        bias = torch.randn(2 * out_channels).to(dtype)[::2]
        out = _poisoned((1, out_channels, height, width), dtype, layouts[1])
        for top_size, layout in (((height // 2, width // 2), layouts[0]), ((height // 2, 5), layouts[1])):
            top = random_map((1, out_channels, *top_size), dtype, layout=layout)
            reading = descriptor_convolution.top_reading(feature, top, config)
            readings.add(reading)
            out.fill_(float("nan"))
            lateral_connection.launch(feature, weight, bias, top, out, "nearest", 0.7, config)
            _close(out, oracle.lateral_connection(feature, weight, bias, top, "nearest", 0.7))
        out.fill_(float("nan"))
        lateral_connection.launch(feature, weight, None, None, out, "nearest", 1.0, config)
        _close(out, oracle.lateral_connection(feature, weight))
    assert {"channels", "gather"} <= readings


@pytest.mark.sampled(2)
@interpreted
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        pytest.param(((3, 5), (7, 9)), "nhwc", id="odd-sizes"),
        pytest.param(((1, 1), (9, 8)), "nchw", id="a-1x1-top"),
        pytest.param(((9, 8), (4, 8)), "nchw", id="a-top-that-shrinks"),
        pytest.param(((4, 8), (8, 16)), "nchw", id="doubled-planes"),
        pytest.param(((4, 3), (8, 6)), "nhwc", id="doubled-channels"),
        pytest.param(((30, 3), (58, 4)), "nhwc", id="uneven-float32-indices"),
    ],
)
def test_the_table_entry_turns_it_on(
    sizes: tuple[tuple[int, int], tuple[int, int]], layout: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    top_size, size = sizes
    feature, top = (random_map((2, c, *s), torch.bfloat16, layout=layout) for c, s in ((24, size), (40, top_size)))
    weight, bias = _weight(40, 24, torch.bfloat16), torch.randn(40).bfloat16()
    launched: list[object] = []
    plan = lateral_connection_descriptors.plan

    def recorded(config: object, *arguments: object) -> object:
        launched.append(config)
        return plan(config, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lateral_connection_descriptors, "plan", recorded)
    arguments = (feature, weight, bias, top, mode, 0.5, None)
    expected = lateral_connection.lateral_connection(*arguments)
    assert not launched, "it stays off until it has been measured"
    monkeypatch.setattr(lateral_connection, "DESCRIPTORS", frozenset({"half"}))
    result = lateral_connection.lateral_connection(*arguments)
    assert len(launched) == 1
    assert result.stride() == expected.stride()
    if mode == "bilinear":
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7)
    else:
        _close(result, oracle.lateral_connection(feature, weight, bias, top, mode, 0.5))


@interpreted
def test_what_it_cannot_read_stays_with_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lateral_connection, "DESCRIPTORS", frozenset({"half", "ieee"}))
    monkeypatch.setattr(lateral_connection_descriptors, "plan", None)  # not callable: it would raise
    weight = _weight(8, 16, torch.float16)
    for feature in (
        random_map((1, 16, 5, 9), torch.float16),
        random_map((1, 16, 4, 8), torch.float16, layout="misaligned"),
        random_map((1, 17, 4, 9), torch.float16, layout="nhwc")[:, :16],
        random_map((1, 16, 4, 8), torch.float16, layout="expanded"),
    ):
        assert "NHWC or NCHW map" in str(eligibility.lateral_connection_descriptors(feature, weight))
        result = lateral_connection.lateral_connection(feature, weight, None, None, "nearest", 1.0, None)
        _close(result, oracle.lateral_connection(feature, weight))


@interpreted
@pytest.mark.parametrize("layout", FORMATS)
def test_int64_offsets_give_the_same_results(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TABLE["half", "small"]
    feature, top = (random_map((2, c, *s), torch.half, layout=layout) for c, s in ((24, (5, 8)), (9, (3, 3))))
    weight = _weight(9, 24, torch.half)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(geometry, "needs_int64", lambda *tensors, wide=wide: wide)
        out = _poisoned((2, 9, 5, 8), torch.half, layout)
        lateral_connection.launch(feature, weight, None, top, out, "nearest", 0.5, config)
        results.append(out)
    assert torch.equal(*results)
    _close(results[0], oracle.lateral_connection(feature, weight, None, top, "nearest", 0.5))


def test_the_tile_follows_the_map() -> None:
    large, medium, small = (TABLE["half", size] for size in ("large", "medium", "small"))

    def choose(height: int, width: int, channels: int = 256, layout: str = "nhwc") -> object:
        out = torch.empty(1, channels, height, width, dtype=torch.half, device="meta")
        return lateral_connection_descriptors.choose("half", out.to(memory_format=FORMATS[layout]), 132)

    assert choose(200, 320) == large and choose(100, 160) == medium and choose(25, 40) == small
    assert choose(200, 320, layout="nchw") == large
    assert choose(200, 321, layout="nchw") == medium, "its rows are no multiples of 16 bytes: not written in boxes"
    assert choose(200, 320, channels=48) == small
