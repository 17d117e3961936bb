"""The README's examples for other libraries, run as they stand: on the libraries that are here, else on their twins."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign import detectron2_twin, effdet_twin, mmdet_twin, sam2_twin, smp_twin, torchvision_twin
from fusion_cases import RES
from resnet_twins import kuangliu_fpn101
from torch import nn
from twins import CHANNELS, WIDTH

from fpn_kernels.interop.swapping import is_fused

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SECTION = README.split("## The models that you have\n")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


def _holding(name: str, module: nn.Module) -> nn.Module:
    model = nn.Module()
    model.add_module(name, module)
    return model


def _detectron2(config: str, trained: bool) -> nn.Module:
    fpn = detectron2_twin.FPN(detectron2_twin.BottomUp(CHANNELS), RES, CHANNELS, WIDTH)
    return _holding("backbone", fpn)


def _effdet(config: Any, pretrained_backbone: bool) -> nn.Module:
    method = "sum" if config.fpn_name.endswith("_sum") else "fastattn"
    cell = effdet_twin.BiFpnLayer([8, 8, 8], WIDTH, [(16, 16), (8, 8), (4, 4)], weight_method=method)
    return _holding("fpn", cell)


# Module to the names in it. What is no plain installation (or wants a file beside it) is always the twin.
_STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {
    "torchvision.models.detection": {
        "fasterrcnn_resnet50_fpn": lambda **options: _holding(
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
_REAL_ONES = ("torchvision", "segmentation_models_pytorch", "effdet")
_INSTALLED = [package for package in _REAL_ONES if importlib.util.find_spec(package)]


@pytest.fixture
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, types.ModuleType] = {}
    for path, names in _STAND_INS.items():
        parts = path.split(".")
        if parts[0] in _INSTALLED:
            continue
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            made.setdefault(name, types.ModuleType(name))
            if end > 1:
                setattr(made[".".join(parts[: end - 1])], parts[end - 1], made[name])
        made[path].__dict__.update(names)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.filterwarnings("default")  # of the libraries
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, Any] = {}
    exec(compile(EXAMPLES[number], f"example {number} of the section", "exec"), variables)
    if "fuse(model)" in EXAMPLES[number]:
        assert any(is_fused(module) for module in variables["model"].modules())
    else:
        assert capsys.readouterr().out.strip() in EXAMPLES[number]


def test_there_is_one_for_each_dialect() -> None:
    from fpn_kernels.interop.dialects import DIALECTS

    packages = [dialect.packages[0] if dialect.packages else "FPN101" for dialect in DIALECTS]
    assert all(any(package in example for example in EXAMPLES) for package in packages)
