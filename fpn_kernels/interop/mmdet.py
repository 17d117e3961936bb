"""MMDetection's `FPN`: tuple to tuple, with start and end levels and four kinds of extra levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters, in_channels, resize_refusal
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import Order, in_layout_of, pyramid

_ORDER = Order(laterals_first=True, outputs="finest first")
_SOURCES = ("on_input", "on_lateral", "on_output")


class MMDetectionForward(FusedForward):
    """Takes one map per entry of `in_channels` and uses those from `start_level` on."""

    in_channels: Sequence[int]
    lateral_convs: nn.ModuleList
    fpn_convs: nn.ModuleList
    num_outs: int
    start_level: int
    backbone_end_level: int
    add_extra_convs: bool | str
    relu_before_extra_convs: bool

    def forward(self, inputs: Sequence[Tensor]) -> Any:
        # fp16_enabled is the mixed precision of MMDetection 2, which the decorator `auto_fp16` implements.
        if len(inputs) != len(self.in_channels) or getattr(self, "fp16_enabled", False):
            return super().forward(inputs)  # type: ignore[misc]
        resize = _resize(self)
        levels = len(self.lateral_convs)
        features = inputs[self.start_level : self.start_level + levels]
        merged, outputs = pyramid(
            features,
            list(self.lateral_convs),
            list(self.fpn_convs)[:levels],
            mode=resize.get("mode", "nearest"),
            scale_factor=None if "scale_factor" not in resize else int(resize["scale_factor"]),
            order=_ORDER,
            find_parameters=block_parameters,
        )
        extra = self.num_outs - levels
        if not self.add_extra_convs:
            for _ in range(extra):
                outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
            return tuple(outputs)
        source = _source(self)
        last = in_layout_of(features[-1], merged[-1])
        for level in range(levels, levels + extra):
            if level > levels:
                source = "on_output"
            chosen = {"on_input": inputs[self.backbone_end_level - 1], "on_lateral": last}.get(source, outputs[-1])
            relu = self.relu_before_extra_convs and level > levels
            outputs.append(self.fpn_convs[level](F.relu(chosen) if relu else chosen))
        return tuple(outputs)


def _resize(module: Any) -> dict[str, Any]:
    """`upsample_cfg`, which versions before 2.0 do not have."""
    return getattr(module, "upsample_cfg", {"mode": "nearest"})


def _source(module: Any) -> str:
    """The input of the first extra convolution; versions before 2.0 have two booleans for it."""
    if module.add_extra_convs is True:
        return "on_input" if getattr(module, "extra_convs_on_inputs", True) else "on_output"
    return str(module.add_extra_convs)


class MMDetectionDialect(Dialect):
    name = "MMDetection FPN"
    packages = ("mmdet",)
    class_names = ("FPN",)
    parts = ((nn.ModuleList, ("lateral_convs", "fpn_convs")),)
    options: tuple[str, ...] = ("in_channels", "num_outs", "start_level", "backbone_end_level")
    options += ("add_extra_convs", "relu_before_extra_convs")
    forwards = (MMDetectionForward,)
    decorators = ("mmcv.runner.fp16_utils", "mmdet.core.fp16.decorators")

    def fits(self, module: Any) -> bool:
        return super().fits(module) and len(module.fpn_convs) >= len(module.lateral_convs) > 0

    def refusal(self, module: Any) -> str | None:
        if module.add_extra_convs and _source(module) not in _SOURCES:
            return f"add_extra_convs={module.add_extra_convs!r} is not one of {', '.join(map(repr, _SOURCES))}"
        resize = dict(_resize(module))
        mode, align_corners = resize.pop("mode", "nearest"), resize.pop("align_corners", None)
        scale_factor = resize.pop("scale_factor", None)
        if resize:
            return f"upsample_cfg: {', '.join(resize)} is not supported"
        return resize_refusal("upsample_cfg", mode, align_corners=align_corners, scale_factor=scale_factor)

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        channels = list(module.in_channels)
        for level, block in enumerate(module.lateral_convs, start=module.start_level):
            channels[level] = in_channels(block)
        scale_factor = _resize(module).get("scale_factor")
        if scale_factor in (None, 2):
            return (tuple(random.pyramid(channels, exact=scale_factor is not None)),)
        sizes = [(3 * int(scale_factor) ** n, 2 * int(scale_factor) ** n) for n in reversed(range(len(channels)))]
        return (tuple(random.normal(2, c, *size) for c, size in zip(channels, sizes, strict=True)),)
