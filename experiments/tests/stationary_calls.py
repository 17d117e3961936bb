"""Calls of the stationary kernels, and a launch that is checked."""

from __future__ import annotations

import random
from typing import Any

import torch
from maps import FORMATS, check, filled, random_map, random_weight, transposed
from torch import Tensor

from experiments.stationary import launch as stationary
from experiments.stationary.launch import FLAT_TABLE, TABLE, StationaryConfig
from fpn_kernels.gpu.launch import ALONE, Link

LAYOUTS = {"channels": "nhwc", "pixels": "nchw"}
# The tile, the layouts of feature and result, and whether the tile takes a coarser map.
TILES = [
    *((config, "nhwc", "nhwc", True) for config in TABLE.values()),
    *(
        (config, feature, LAYOUTS[axis], (axis, size) != ("channels", "large"))
        for (axis, size), config in FLAT_TABLE.items()
        for feature in FORMATS
        if (axis, feature) != ("pixels", "nhwc")
    ),
]


def make_call(config: StationaryConfig, device: str = "cpu", layouts: Any = ("nhwc", "nhwc"), **sizes: Any) -> dict:
    """A call with tails along every axis: more pixels than a tile, channels that no tile divides."""
    batch, dtype = sizes.get("batch", 2), random.choice([torch.float16, torch.bfloat16])
    in_channels = sizes.get("in_channels", 2 * config.depth - 24)
    out_channels = sizes.get("out_channels", config.channels + 8)
    height, width = sizes.get("height", config.rows + 2), sizes.get("width", config.columns + 6)
    top = sizes.get("top", (height // 2, width // 2))
    made = {
        "feature": random_map((batch, in_channels, height, width), dtype, layouts[0]),
        "weight": random_weight(out_channels, in_channels, dtype),
        "bias": torch.randn(out_channels).to(dtype),
        "top": None if top is None else random_map((batch, out_channels, *top), dtype, layouts[1]),
    }
    return {name: None if tensor is None else tensor.to(device) for name, tensor in made.items()}


def alone(call: dict[str, Any]) -> dict[str, Any]:
    """The gradient of a feature: no bias, no coarser map, the weight transposed."""
    return {**call, "bias": None, "top": None, "weight": transposed(call["weight"])}


def connect(
    config: StationaryConfig,
    call: dict[str, Any],
    gain: float = 1.0,
    layout: str = "nhwc",
    mode: str = "nearest",
    link: Link = ALONE,
) -> Tensor:
    out = filled(float("nan"), call["feature"], call["weight"].shape[0], layout)
    refusal = stationary.flat_refusal if config.flat else stationary.refusal
    assert refusal(**call, out=out) is None
    stationary.plan(config, **call, out=out, mode=mode, link=link)(**call, out=out, gain=gain)
    check(out, call, mode, gain)
    return out
