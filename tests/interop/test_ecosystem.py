"""`fuse` on the libraries themselves, where they are installed: `make test-ecosystem` installs them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from fusion_cases import leaves
from oracle import error
from torch import Tensor, nn
from twins import served

import fpn_kernels
from fpn_kernels.interop.swapping import is_fused

# What the libraries and their own dependencies warn about is not this library's.
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]

DETECTORS = {
    "fasterrcnn_resnet50_fpn": {"rpn_post_nms_top_n_test": 100, "box_score_thresh": 0.0},
    "fasterrcnn_resnet50_fpn_v2": {"rpn_post_nms_top_n_test": 100, "box_score_thresh": 0.0},
    "maskrcnn_resnet50_fpn": {"box_detections_per_img": 12, "box_score_thresh": 0.0},
    "keypointrcnn_resnet50_fpn": {"box_detections_per_img": 12, "box_score_thresh": 0.0, "num_keypoints": 3},
    "retinanet_resnet50_fpn": {"score_thresh": 0.0},
    "fcos_resnet50_fpn": {"score_thresh": 0.0},
}


def _image() -> Tensor:
    return torch.rand(3, 155, 213)


@functools.cache
def _made(name: str, spread: float) -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "min_size": 160, "max_size": 256}
    model: nn.Module = getattr(detection, name)(**options, **DETECTORS[name])
    model.train()
    with torch.no_grad():
        # BatchNorm as after some training: without, the maps of an untrained ResNet grow by every block.
        for _ in range(2):
            model.backbone(torch.randn(2, 3, 96, 128))
        for heads in ("rpn", "roi_heads", "head"):
            for parameter in getattr(model, heads, nn.Identity()).parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
    return model.eval()


def _pair(name: str, spread: float = 1.0) -> tuple[Any, Any]:
    """The fused model and the unfused one; `spread` puts the scores of an untrained head apart."""
    torch.manual_seed(0)
    model = copy.deepcopy(_made(name, spread))
    fused = copy.deepcopy(model)
    assert fpn_kernels.fuse(fused) is fused
    assert is_fused(fused.backbone.fpn) and not is_fused(model.backbone.fpn)
    return fused, model


def _assert_same_detections(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each detection has its partner: same label, box within a hundredth of a pixel, score within 1e-4."""
    assert list(actual) == list(expected)
    assert len(expected["boxes"]) >= 10 and actual["boxes"].shape == expected["boxes"].shape
    apart = torch.cdist(actual["boxes"], expected["boxes"], p=float("inf"))
    apart = apart + 1e3 * (actual["labels"][:, None] != expected["labels"])
    distance, partner = apart.min(dim=1)
    assert sorted(partner.tolist()) == list(range(len(partner))) and distance.max() < 1e-2
    assert (actual["scores"] - expected["scores"][partner]).abs().max() < 1e-4
    for name in set(expected) - {"boxes", "labels", "scores"}:  # masks, keypoints
        assert error(actual[name], expected[name][partner].double()) < 1e-3, name


@pytest.mark.parametrize("name", DETECTORS)
def test_torchvision_detections_are_the_unfused_models(name: str) -> None:
    fused, model = _pair(name, spread=3.0)
    image = _image()
    with torch.no_grad():
        batch = model.transform([image])[0].tensors
        for got, want in zip(leaves(fused.backbone(batch)), leaves(model.backbone(batch)), strict=True):
            assert error(got, want.double()) < 1e-5
        calls = served(lambda: fused.backbone(batch))
        assert calls.count("lateral_connection") == len(fused.backbone.fpn.inner_blocks)
        (expected,) = model([image])
        (actual,) = fused([image])
    _assert_same_detections(actual, expected)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_torchvision_backbones_have_the_unfused_models_gradients(name: str) -> None:
    fused, model = _pair(name)
    x = torch.randn(2, 3, 99, 130)
    for each in (fused, model):
        torch.manual_seed(1)
        sum((p * torch.randn_like(p)).mean() for p in leaves(each.backbone.train()(x))).backward()
    expected = _gradients(model)
    assert len(expected) > 60 and expected.keys() == _gradients(fused).keys()
    for parameter, got in _gradients(fused).items():
        # 50 layers of BatchNorm in training amplify a rounding of the pyramid's gradient by some tens.
        assert error(got, expected[parameter].double()) < 1e-4, parameter


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_torchvision_training_step_is_the_unfused_models(name: str) -> None:
    """A detector's loss has steps (which proposals are kept, which bin a sample is in) that any rounding may cross.

    What float32 itself makes of losses and gradients is measured against the same step in float64; from eager's float32
    the fused model may differ by a tenth of that.
    """
    fused, model = _pair(name)
    exact = copy.deepcopy(model).double()
    boxes = torch.tensor([[20.0, 30, 90, 100], [100, 40, 180, 130]])
    image, losses = _image(), []
    for each in (fused, model, exact):
        dtype = next(each.parameters()).dtype
        torch.manual_seed(1)  # the samplers draw anchors and proposals
        target = {"boxes": boxes.to(dtype), "labels": torch.tensor([1, 3])}
        losses.append(each.train()([image.to(dtype)], [target]))
        sum(losses[-1].values()).backward()
    for part, want in losses[1].items():
        bound = 1e-4 * want + 1e-6 + 0.1 * (want - losses[2][part]).abs()
        assert (losses[0][part] - want).abs() <= bound, part
    actual, expected, truth = _gradients(fused), _gradients(model), _gradients(exact)
    assert len(expected) > 60 and actual.keys() == expected.keys()
    for parameter, want in expected.items():
        bound = 1e-4 + 0.1 * error(want, truth[parameter])
        assert error(actual[parameter], want.double()) < bound, parameter


def test_torchvision_checkpoints_load_both_ways() -> None:
    fused, model = _pair("fasterrcnn_resnet50_fpn")
    with torch.no_grad():
        for parameter in fused.backbone.fpn.parameters():
            parameter.normal_(std=0.02)
    other = copy.deepcopy(model)
    other.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(1, 3, 99, 130)
    with torch.no_grad():
        for got, want in zip(leaves(fused.backbone(x)), leaves(other.backbone(x)), strict=True):
            assert error(got, want.double()) < 1e-5
        fused.load_state_dict(model.state_dict(), strict=True)
        for got, want in zip(leaves(fused.backbone(x)), leaves(model.backbone(x)), strict=True):
            assert error(got, want.double()) < 1e-5


def test_torchvision_verify_and_back() -> None:
    _, model = _pair("fasterrcnn_resnet50_fpn")
    cls = type(model.backbone.fpn)
    fpn_kernels.fuse(model, verify=[_image()])
    assert isinstance(model.backbone.fpn, cls) and type(model.backbone.fpn) is not cls
    assert type(fpn_kernels.unfuse(model).backbone.fpn) is cls


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d], ids=["none", "bn"])
@pytest.mark.parametrize("extra", [None, "LastLevelMaxPool", "LastLevelP6P7"])
def test_torchvision_pyramids_alone(extra: str | None, norm: Any) -> None:
    ops = pytest.importorskip("torchvision.ops.feature_pyramid_network")
    block = None if extra is None else getattr(ops, extra)(*([24, 12] if extra == "LastLevelP6P7" else []))
    twin = ops.FeaturePyramidNetwork([8, 16, 24], 12, block, norm)
    own = fpn_kernels.FeaturePyramidNetwork([8, 16, 24], 12, copy.deepcopy(block), norm)
    own.load_state_dict(twin.state_dict(), strict=True)
    fused = fpn_kernels.fuse(copy.deepcopy(twin))
    for training in (True, False):
        x = OrderedDict((str(n), torch.randn(2, c, s, s + 2)) for n, (c, s) in enumerate([(8, 37), (16, 19), (24, 10)]))
        expected = twin.train(training)(x)
        for network in (fused, own):
            actual = network.train(training)(x)
            assert list(actual) == list(expected)
            for name, want in expected.items():
                assert error(actual[name], want.detach().double()) < 1e-5, name


def test_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.FPN("resnet18", encoder_weights=None).eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        expected = model(x)
        _, report = fpn_kernels.fuse(model, verify=x, report=True)
        assert list(report.fused) == ["decoder.p4", "decoder.p3", "decoder.p2"]
        assert error(model(x), expected.double()) < 1e-5
        assert served(lambda: model(x)) == ["lateral_connection"] * 3


def test_effdet() -> None:
    effdet = pytest.importorskip("effdet")

    def make(fpn: str) -> nn.Module:
        config = effdet.get_efficientdet_config("efficientdet_d0")
        config.fpn_name, config.image_size = fpn, (256, 256)
        model: nn.Module = effdet.EfficientDet(config, pretrained_backbone=False).eval()
        return model

    model, x = make("bifpn_sum"), torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        expected = leaves(model(x))
        _, report = fpn_kernels.fuse(model, report=True)
        for got, want in zip(leaves(model(x)), expected, strict=True):
            assert error(got, want.double()) < 1e-4
    assert len(report.fused) == 12 and len(report.left) == 12
    with pytest.raises(ValueError, match=r"fpn\.cell\.0\.fnode\.0\.combine .* weight_method='fastattn'"):
        fpn_kernels.fuse(make("bifpn_fa"))


def test_sam2() -> None:
    encoder = pytest.importorskip("sam2.modeling.backbones.image_encoder")
    encoding = pytest.importorskip("sam2.modeling.position_encoding")
    position = encoding.PositionEmbeddingSine(32)
    neck = encoder.FpnNeck(position, 32, [64, 48, 32, 16], fpn_interp_model="nearest", fpn_top_down_levels=[2, 3])
    x = [torch.randn(1, c, s, s) for c, s in zip([16, 32, 48, 64], [32, 16, 8, 4], strict=True)]
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            expected = leaves(fpn_kernels.unfuse(neck)(x))
            actual = leaves(fpn_kernels.fuse(neck)(x))
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == want.dtype and error(got, want.double()) < (1e-5 if dtype is None else 4e-3)


def _mmdet_fpn() -> Any:
    """MMDetection's class; where MMCV is its pure Python build, without the compiled operators, which it needs not."""
    pytest.importorskip("mmcv")
    if importlib.util.find_spec("mmcv._ext") is None and "mmcv.ops" not in sys.modules:
        names = ["", ".nms", ".roi_align", ".deform_conv", ".modulated_deform_conv", ".carafe"]
        for name in [*names, ".merge_cells", ".multi_scale_deform_attn"]:
            stand_in = types.ModuleType(f"mmcv.ops{name}")
            stand_in.__getattr__ = _absent_operator  # type: ignore[method-assign]
            sys.modules[stand_in.__name__] = stand_in
    return pytest.importorskip("mmdet.models.necks.fpn").FPN


def _absent_operator(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (nn.Module,), {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_cfg": {"type": "BN"}, "add_extra_convs": "on_output", "relu_before_extra_convs": True},
        {"norm_cfg": {"type": "GN", "num_groups": 4}, "start_level": 1, "add_extra_convs": "on_input"},
        {"norm_cfg": {"type": "BN"}, "no_norm_on_lateral": True, "add_extra_convs": "on_lateral"},
        {"upsample_cfg": {"mode": "bilinear"}},
        {"act_cfg": {"type": "ReLU"}},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_mmdet(options: dict[str, Any]) -> None:
    neck = _mmdet_fpn()([8, 16, 24, 32], 12, 6, **options)
    fused = fpn_kernels.fuse(copy.deepcopy(neck))
    x = tuple(torch.randn(2, c, s, s + 3) for c, s in zip([8, 16, 24, 32], [41, 21, 11, 6], strict=True))
    for training in (True, False):
        expected, actual = neck.train(training)(x), fused.train(training)(x)
        for got, want in zip(actual, expected, strict=True):
            assert error(got, want.detach().double()) < 2e-5


@pytest.mark.parametrize("norm", [None, "BN"])
def test_mmdet_weights_in_torchvision(norm: str | None) -> None:
    ops = pytest.importorskip("torchvision.ops.feature_pyramid_network")
    neck = _mmdet_fpn()([8, 16, 24, 32], 12, 4, norm_cfg=norm and {"type": norm})
    fpn = ops.FeaturePyramidNetwork([8, 16, 24, 32], 12, None, norm and nn.BatchNorm2d).eval()
    fpn.load_state_dict(fpn_kernels.convert_state_dict(neck.state_dict(), "mmdet", "torchvision"), strict=True)
    x = tuple(torch.randn(2, c, s, s + 3) for c, s in zip([8, 16, 24, 32], [41, 21, 11, 6], strict=True))
    with torch.no_grad():
        named = fpn(OrderedDict((str(level), m) for level, m in enumerate(x)))
        for got, want in zip(named.values(), neck.eval()(x), strict=True):
            assert error(got, want.double()) < 1e-5


def test_detectron2() -> None:
    fpn = pytest.importorskip("detectron2.modeling.backbone.fpn")
    config = pytest.importorskip("detectron2.config").get_cfg()
    shape = pytest.importorskip("detectron2.layers").ShapeSpec(channels=3)
    for norm in ("", "BN", "FrozenBN", "GN"):
        for fuse_type in ("sum", "avg"):
            config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
            config.MODEL.FPN.NORM, config.MODEL.FPN.FUSE_TYPE = norm, fuse_type
            model = fpn.build_resnet_fpn_backbone(config, shape).eval()
            x = torch.randn(1, 3, 64, 96)
            with torch.no_grad():
                expected = model(x)
                actual = fpn_kernels.fuse(model, verify=x)(x)
            assert list(actual) == list(expected)
            for name, want in expected.items():
                assert error(actual[name], want.double()) < 1e-5, (norm, fuse_type, name)
