"""`ResNetFPN` against the systems it must express, written in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from oracle import error
from resnet_twins import (
    KUANGLIU_NAMES,
    OUT,
    SINGLE_FILE_NAMES,
    detectron2_fpn,
    detectron2_names,
    kuangliu_fpn101,
    single_file_fpn,
    translated,
)
from torch import Tensor, nn
from twins import group_norm, served

from fpn_kernels.modules import FrozenBatchNorm2d, LastLevelP6P7, ResNetFPN, resnet50_fpn, resnet101_fpn

SMALL: dict[str, Any] = {"layers": (1, 2, 1, 1), "out_channels": OUT, "width": 4}


def settle(model: nn.Module) -> None:
    """Weights and statistics under which no map dies out or explodes and no fold is the identity."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 4:
                nn.init.kaiming_normal_(value, mode="fan_in")
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith(".weight"):
                value.uniform_(0.3, 0.7)
            elif value.is_floating_point():
                value.normal_(std=0.1)


def assert_pyramid(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for level, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == want.shape and error(got.detach(), want.detach().double()) < 1e-5, level


def assert_equal_with_gradients(model: ResNetFPN, twin: nn.Module, names: list[tuple[str, str]], size: Any) -> None:
    """Loads the twin's checkpoint strictly; compares the maps and the gradient of every parameter and the image."""
    settle(twin)
    model.load_state_dict(translated(twin.state_dict(), names), strict=True)
    for mode in (False, True):
        model.train(mode), twin.train(mode)
        x = torch.randn(2, 3, *size, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        actual, expected = model(x), twin(y)
        if isinstance(expected, dict):
            assert type(actual) is OrderedDict and list(actual) == list(expected)
            actual, expected = tuple(actual.values()), tuple(expected.values())
        assert type(actual) is tuple
        assert_pyramid(actual, expected)
        model.zero_grad(), twin.zero_grad()
        weights = [torch.randn_like(p) for p in expected]
        for maps in (actual, expected):
            sum((p * w).sum() for p, w in zip(maps, weights, strict=True)).backward()
        # float32 through 7 blocks and BatchNorm in training: rounding is amplified, a wrong path is not small.
        assert error(x.grad, y.grad.double()) < 1e-3
        theirs = translated({n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, names)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert error(parameter.grad, theirs[name].double()) < 1e-3, name
            else:
                assert parameter.grad is None


# ------------------------------------------------------------------------------------------------ systems


_NO_P6: dict[str, Any] = {"mode": "bilinear", "smooth": (2, 3, 4), "extra_blocks": None, "return_tuple": True}
_DETECTRON2: dict[str, Any] = {"norm_layer": FrozenBatchNorm2d, "stride_in_1x1": True}


def test_the_single_file_resnet_fpn() -> None:
    model = ResNetFPN(**SMALL, **_NO_P6)
    assert_equal_with_gradients(model, single_file_fpn([1, 2, 1, 1], 4), SINGLE_FILE_NAMES, (75, 113))
    with torch.no_grad():
        assert served(lambda: model.eval()(torch.randn(1, 3, 75, 113))) == ["lateral_connection"] * 4


def test_kuangliu_fpn101() -> None:
    model = ResNetFPN((2, 2, 2, 2), OUT, width=4, **_NO_P6)
    assert_equal_with_gradients(model, kuangliu_fpn101(4), KUANGLIU_NAMES, (60, 90))


@pytest.mark.parametrize(("fuse_type", "norm"), [("sum", None), ("avg", group_norm)], ids=["plain", "avg-gn"])
def test_detectron2(fuse_type: str, norm: Any) -> None:
    model = ResNetFPN(**SMALL, **_DETECTRON2, fuse_type=fuse_type, fpn_norm_layer=norm)
    twin = detectron2_fpn([1, 2, 1, 1], 4, norm=norm, fuse_type=fuse_type)
    assert_equal_with_gradients(model, twin, detectron2_names(2), (64, 96))


def test_detectron2_retinanet_takes_p6_and_p7_from_res5() -> None:
    model = ResNetFPN(**SMALL, **_DETECTRON2, levels=(3, 4, 5), extra_blocks=LastLevelP6P7(128, OUT))
    twin = detectron2_fpn([1, 2, 1, 1], 4, retina=True)
    assert_equal_with_gradients(model, twin, detectron2_names(3), (64, 96))


# ----------------------------------------------------------------------------------------- published sizes and weights


def test_resnet50_map_sizes_of_a_600_by_900_image() -> None:
    with torch.device("meta"), torch.no_grad():
        maps = resnet50_fpn().eval()(torch.randn(1, 3, 600, 900))
    sizes = {"p2": (150, 225), "p3": (75, 113), "p4": (38, 57), "p5": (19, 29), "p6": (10, 15)}
    assert {name: tuple(p.shape) for name, p in maps.items()} == {n: (1, 256, *size) for n, size in sizes.items()}


def torchvision_resnet_keys(layers: tuple[int, ...]) -> list[str]:
    """The keys of torchvision's published ResNet weights, in their order."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *norm("bn1")]
    for stage, blocks in enumerate(layers, start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}."
            for index in (1, 2, 3):
                keys += [f"{prefix}conv{index}.weight", *norm(f"{prefix}bn{index}")]
            if block == 0:
                keys += [f"{prefix}downsample.0.weight", *norm(f"{prefix}downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("build", "layers", "entries", "parameters"),
    [(resnet50_fpn, (3, 4, 6, 3), 320, 25_557_032), (resnet101_fpn, (3, 4, 23, 3), 626, 44_549_160)],
)
def test_published_resnet_weights_load(build: Any, layers: Any, entries: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    published = torchvision_resnet_keys(layers)
    assert len(published) == entries and list(model.body.state_dict()) == published[:-2]
    # torchvision documents the size of each model; the classifier, 2048 x 1000 + 1000, is not part of ours.
    assert sum(p.numel() for p in model.body.parameters()) + 2_049_000 == parameters
    checkpoint = {**model.body.state_dict(), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    model.body.load_state_dict(checkpoint, strict=True, assign=True)
    assert "fc.weight" in checkpoint, "the caller's checkpoint was changed"
    assert list(model.state_dict())[-2:] == ["fpn.layer_blocks.3.0.weight", "fpn.layer_blocks.3.0.bias"]


def test_all_but_the_classifier_must_match() -> None:
    body = ResNetFPN(**SMALL).body
    state = body.state_dict()
    with pytest.raises(RuntimeError, match="fc2.weight"):
        body.load_state_dict({**state, "fc2.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing.*layer2.1.conv3.weight"):
        body.load_state_dict({name: v for name, v in state.items() if name != "layer2.1.conv3.weight"})


def test_batch_norm_checkpoint_in_a_frozen_body() -> None:
    trained, frozen = ResNetFPN(**SMALL), ResNetFPN(**SMALL, norm_layer=FrozenBatchNorm2d)
    settle(trained)
    frozen.load_state_dict(trained.state_dict(), strict=True)
    assert not any(name.endswith("num_batches_tracked") for name in frozen.state_dict())
    x = torch.randn(1, 3, 33, 65)
    with torch.no_grad():
        assert_pyramid(frozen(x).values(), trained.eval()(x).values())


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 33), (64, 64)])
def test_any_image_size(size: tuple[int, int]) -> None:
    maps = ResNetFPN(**SMALL).eval()(torch.randn(2, 3, *size))
    for name, p in maps.items():
        stride = 2 ** int(name[1:])
        assert tuple(p.shape) == (2, OUT, -(-size[0] // stride), -(-size[1] // stride))
        assert torch.isfinite(p).all()


def test_levels_smooth_and_names() -> None:
    model = ResNetFPN(**SMALL, levels=(3, 4), smooth=()).eval()
    maps = model(torch.randn(1, 3, 64, 64))
    assert list(maps) == ["p3", "p4", "p5"]
    assert [name for name in model.state_dict() if "layer_blocks" in name] == []
    c4 = model.body(torch.randn(1, 3, 64, 64))[2]
    assert c4.shape[1] == model.fpn.inner_blocks[1][0].in_channels
    assert torch.equal(maps["p5"], maps["p4"][:, :, ::2, ::2])


def test_freeze_at() -> None:
    model = ResNetFPN(**SMALL, freeze_at=2).train()
    before = copy.deepcopy(model.body.state_dict())
    maps = model(torch.randn(2, 3, 64, 64))
    sum(p.square().mean() for p in maps.values()).backward()
    for name, parameter in model.body.named_parameters():
        frozen = name.startswith(("conv1", "bn1", "layer1"))
        assert parameter.requires_grad is not frozen and (parameter.grad is None) is frozen, name
    for name, buffer in model.body.named_buffers():
        moved = not torch.equal(buffer, before[name])
        assert moved is not name.startswith(("bn1", "layer1")), name
    assert not model.body.layer1.training and model.body.layer2.training and model.fpn.training
    model.eval()
    assert not any(m.training for m in model.modules())


def test_channels_last_images_copies_and_autocast() -> None:
    model = ResNetFPN(**SMALL, mode="bilinear").eval()
    settle(model)
    x = torch.randn(2, 3, 47, 61)
    with torch.no_grad():
        expected = model(x)
        assert_pyramid(copy.deepcopy(model)(x).values(), expected.values())
        assert_pyramid(pickle.loads(pickle.dumps(model))(x).values(), expected.values())
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(x)
        for name, p in actual.items():
            assert p.dtype == torch.bfloat16 and error(p, expected[name].double()) < 0.1
        actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert_pyramid(actual.values(), expected.values())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in actual.values())


@pytest.mark.nightly  # the pyramid, the part with operators of this library, is compiled in `make test`
def test_compile_and_export() -> None:
    model = ResNetFPN((1, 1, 1, 1), OUT, width=4, mode="bilinear").eval()
    settle(model)
    x = torch.randn(1, 3, 47, 61)
    with torch.no_grad():
        expected = model(x).values()
        assert_pyramid(torch.compile(model, fullgraph=True, backend="aot_eager")(x).values(), expected)
        assert_pyramid(torch.export.export(model, (x,)).module()(x).values(), expected)


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"layers": (3, 4, 6)}, ValueError, "layers: expected four numbers"),
        ({"layers": (3, 4, 0, 3)}, ValueError, "layers: expected four numbers"),
        ({"layers": 50}, TypeError, "layers: expected a sequence of integers, got 50"),
        ({"levels": (3, 2)}, ValueError, "levels: expected ascending"),
        ({"levels": (4, 5, 6)}, ValueError, "levels: expected ascending"),
        ({"levels": ()}, ValueError, "levels: expected ascending"),
        ({"smooth": (2, 6)}, ValueError, "smooth: expected levels out of"),
        ({"smooth": True}, TypeError, "smooth: expected a sequence of integers, got True"),
        ({"extra_blocks": "p6"}, ValueError, "extra_blocks: expected 'pool'"),
        ({"extra_blocks": nn.Identity()}, TypeError, "extra_blocks: expected an ExtraFPNBlock"),
        ({"norm_layer": nn.BatchNorm2d(4)}, TypeError, "norm_layer: expected a callable"),
        ({"fpn_norm_layer": "GN"}, TypeError, "norm_layer: expected a callable"),
        ({"freeze_at": 6}, ValueError, "freeze_at: expected 0 to 5, got 6"),
        ({"freeze_at": True}, TypeError, "freeze_at: expected an integer, got bool"),
        ({"width": 0}, ValueError, "width: expected at least 1, got 0"),
        ({"mode": "cubic"}, ValueError, "mode: .*'cubic'"),
        ({"fuse_type": "max"}, ValueError, "fuse_type: .*'max'"),
        ({"out_channels": 0}, ValueError, "out_channels"),
    ],
)
def test_constructor_errors(options: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        ResNetFPN(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("image", "error_type", "message"),
    [
        ([torch.zeros(3, 8, 8)], TypeError, "image: expected a Tensor .*got list"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "image: expected a floating.*got torch.uint8"),
        (torch.zeros(3, 8, 8), ValueError, r"image: .*got shape \(3, 8, 8\)"),
        (torch.zeros(1, 8, 8, 3), ValueError, r"image: .*got shape \(1, 8, 8, 3\)"),
        (torch.zeros(1, 3, 0, 8), ValueError, "image: .*H, W >= 1"),
    ],
)
def test_image_errors(image: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        ResNetFPN(**SMALL)(image)


def test_a_batch_of_no_images() -> None:
    maps: OrderedDict[str, Tensor] = ResNetFPN(**SMALL).eval()(torch.zeros(0, 3, 64, 64))
    assert [tuple(p.shape) for p in maps.values()] == [(0, OUT, s, s) for s in (16, 8, 4, 2, 1)]
