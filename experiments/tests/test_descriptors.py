"""`experiments.descriptors` against float64, under the interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from maps import FORMATS, check, filled, random_map, random_weight, transposed

from experiments.descriptors import launch
from experiments.descriptors.launch import TABLE, DescriptorConfig
from fpn_kernels.gpu import geometry

pytestmark = pytest.mark.interpreter


def _connect(config: DescriptorConfig, call: dict[str, Any], layout: str, mode: str, gain: float) -> torch.Tensor:
    out = filled(float("nan"), call["feature"], call["weight"].shape[0], layout)
    launch.plan(config, **call, out=out, mode=mode)(**call, out=out, gain=gain)
    check(out, call, mode, gain)
    return out


@pytest.mark.parametrize("key", TABLE, ids="-".join)
def test_every_tile(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than a box, more channels than a tile and a step; tops by boxes and gathered; every layout."""
    config, arithmetic = TABLE[key], key[0]
    monkeypatch.setattr(geometry, "arithmetic_of", lambda feature: arithmetic)
    monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", 3)
    monkeypatch.setattr(launch, "_PACKED_ROWS", 64)  # fewer programs to interpret
    dtypes = itertools.cycle((torch.float16, torch.bfloat16) if arithmetic == "half" else (torch.float32,))
    height, width = config.rows + 2, config.columns + 16
    in_channels, out_channels = config.depth + 8, config.channels + 8
    readings = set()
    for (layout, out_layout), dtype in zip(itertools.product(FORMATS, repeat=2), dtypes, strict=False):
        feature = random_map((1, in_channels, height, width), dtype, layout)
        weight = random_weight(out_channels, in_channels, dtype)
        bias = torch.randn(2 * out_channels).to(dtype)[::2]
        call = {"feature": feature, "weight": weight, "bias": bias}
        for top_size, top_layout in (((height // 2, width // 2), layout), ((height // 2, 5), out_layout)):
            call["top"] = random_map((1, out_channels, *top_size), dtype, top_layout)
            readings.add(launch.top_reading(feature, call["top"], config))
            _connect(config, call, out_layout, "nearest", 0.7)
        alone = {"feature": feature, "weight": transposed(weight), "bias": None, "top": None}
        _connect(config, alone, out_layout, "nearest", 1.0)
    assert {"channels", "gather"} <= readings


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(
    ("top_size", "size", "layout"),
    [
        pytest.param((3, 5), (7, 9), "nhwc", id="odd-sizes"),
        pytest.param((1, 1), (9, 8), "nchw", id="a-1x1-top"),
        pytest.param((9, 8), (4, 8), "nchw", id="a-top-that-shrinks"),
        pytest.param((4, 8), (8, 16), "nchw", id="doubled-planes"),
        pytest.param((30, 3), (58, 4), "nhwc", id="uneven-float32-indices"),
    ],
)
def test_sizes_of_the_top(top_size: tuple[int, int], size: tuple[int, int], layout: str, mode: str) -> None:
    call = {
        "feature": random_map((2, 24, *size), torch.bfloat16, layout),
        "weight": random_weight(40, 24, torch.bfloat16),
        "bias": torch.randn(40).bfloat16(),
        "top": random_map((2, 40, *top_size), torch.bfloat16, layout),
    }
    out = filled(0.0, call["feature"], 40, layout)
    (config,) = launch.candidates(**call, out=out)
    _connect(config, call, layout, mode, 0.5)


def test_refusals() -> None:
    weight = random_weight(8, 16, torch.float16)
    for feature in (
        random_map((1, 16, 5, 9), torch.float16, "nchw"),
        random_map((1, 2, 16, 65), torch.float16, "nchw").view(-1)[1:513].view(1, 16, 4, 8),
        random_map((1, 17, 4, 9), torch.float16)[:, :16],
        random_map((1, 16, 1, 8), torch.float16, "nchw").expand(1, 16, 4, 8),
    ):
        assert "NHWC or NCHW map" in str(launch.refusal(feature, weight))
        assert launch.candidates(feature, weight, None, None, feature) == []
    assert launch.refusal(random_map((1, 16, 5, 9), torch.float16), weight) is None
    wide = torch.empty(1, dtype=torch.float16, device="meta").expand(2**16, 2**15)
    assert "int32" in str(launch.refusal(random_map((1, 16, 5, 9), torch.float16), wide))


@pytest.mark.parametrize("layout", FORMATS)
def test_int64_offsets_give_the_same_results(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature, top = (random_map((2, c, *size), torch.half, layout) for c, size in ((24, (5, 8)), (9, (3, 3))))
    call = {"feature": feature, "weight": random_weight(9, 24, torch.half), "bias": None, "top": top}
    results = []
    for wide in (False, True):
        monkeypatch.setattr(geometry, "needs_int64", lambda *tensors, wide=wide: wide)
        results.append(_connect(TABLE["half", "small"], call, layout, "nearest", 0.5))
    assert torch.equal(*results)
