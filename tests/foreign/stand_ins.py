"""Installs the twins under the names of their libraries, if these are not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from resnet_twins import kuangliu_fpn101
from torch import nn

from foreign import detectron2_twin, effdet_twin, mmdet_twin, sam2_twin, smp_twin, torchvision_twin

# Narrow versions of ResNet-50's.
CHANNELS, WIDTH = [8, 16, 24, 32], 8


def _holding(name: str, module: nn.Module) -> nn.Module:
    model = nn.Module()
    model.add_module(name, module)
    return model


def _detectron2(config: str, trained: bool) -> nn.Module:
    levels = ("res2", "res3", "res4", "res5")
    fpn = detectron2_twin.FPN(detectron2_twin.BottomUp(CHANNELS), levels, CHANNELS, WIDTH)
    return _holding("backbone", fpn)


def _effdet(config: Any, pretrained_backbone: bool) -> nn.Module:
    method = "sum" if config.fpn_name.endswith("_sum") else "fastattn"
    cell = effdet_twin.BiFpnLayer([8, 8, 8], WIDTH, [(16, 16), (8, 8), (4, 4)], weight_method=method)
    return _holding("fpn", cell)


# Each module, with its names.
STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {
    "torchvision.models.detection": {
        "fasterrcnn_resnet50_fpn": lambda weights, weights_backbone: _holding(
            "backbone", torchvision_twin.BackboneWithFPN(CHANNELS, WIDTH)
        )
    },
    "torchvision.ops": {"FeaturePyramidNetwork": torchvision_twin.FeaturePyramidNetwork},
    "detectron2.model_zoo": {"get": _detectron2},
    "mmdet.apis": {
        "init_detector": lambda config, device: _holding("neck", mmdet_twin.FPN(CHANNELS, WIDTH, 5)),
    },
    "sam2.build_sam": {
        "build_sam2": lambda config, device: _holding(
            "neck", sam2_twin.FpnNeck(sam2_twin.PositionEncoding(), WIDTH, CHANNELS[::-1])
        ),
    },
    "segmentation_models_pytorch": {
        "FPN": lambda encoder, encoder_weights: _holding("decoder", smp_twin.FPNDecoder(CHANNELS, WIDTH)),
    },
    "effdet": {"get_efficientdet_config": lambda name: types.SimpleNamespace(fpn_name=""), "EfficientDet": _effdet},
    "fpn": {"FPN101": lambda: kuangliu_fpn101(4)},
}
# The other libraries require more than an installation, so tests always use their twins.
_REAL_ONES = ("torchvision", "segmentation_models_pytorch", "effdet")


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import detectron2` etc. return the twins until the test ends."""
    made: dict[str, types.ModuleType] = {}
    for path, names in STAND_INS.items():
        parts = path.split(".")
        if parts[0] in _REAL_ONES and importlib.util.find_spec(parts[0]):
            continue
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            made.setdefault(name, types.ModuleType(name))
            if end > 1:
                setattr(made[".".join(parts[: end - 1])], parts[end - 1], made[name])
        made[path].__dict__.update(names)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
