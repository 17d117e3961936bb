"""`convert_state_dict`: the weights of each dialect in the modules of each other dialect that can hold them."""

from __future__ import annotations

import functools
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign import detectron2_twin, mmdet_twin, sam2_twin, smp_twin, torchvision_twin
from fusion_cases import DOUBLING, RES
from resnet_twins import OUT, kuangliu_fpn101
from torch import Tensor, nn
from twins import CHANNELS, NAMES, WIDTH, group_norm, scramble

import fpn_kernels
from fpn_kernels import convert_state_dict

_BN = nn.BatchNorm2d


def _torchvision(norm: Any = None, extra: bool = False, library: Any = torchvision_twin) -> nn.Module:
    blocks = library.LastLevelP6P7(CHANNELS[-1], WIDTH) if extra else None
    return library.FeaturePyramidNetwork(CHANNELS, WIDTH, blocks, norm)


_own = functools.partial(_torchvision, library=fpn_kernels)


def _detectron2(norm: Any = None, extra: bool = False) -> nn.Module:
    top = detectron2_twin.LastLevelP6P7(CHANNELS[-1], WIDTH) if extra else None
    return detectron2_twin.FPN(nn.Identity(), RES, CHANNELS, WIDTH, norm, top)


def _sam2() -> nn.Module:
    return sam2_twin.FpnNeck(sam2_twin.PositionEncoding(), WIDTH, CHANNELS[::-1], fpn_interp_model="nearest")


def _maps() -> list[Tensor]:
    return [torch.randn(2, c, *size) for c, size in zip(CHANNELS, DOUBLING, strict=True)]


def _assert_same(actual: Any, expected: Any) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def _ids(state: Any) -> dict[str, int]:
    """The identity of each value: a converted state holds the same objects."""
    return {name: id(value) for name, value in state.items()}


def _mmdet(norm: Any = None, extra: bool = False) -> nn.Module:
    options: Any = {"add_extra_convs": "on_input", "relu_before_extra_convs": True} if extra else {}
    name = {None: None, _BN: "BN", group_norm: "GN"}[norm]
    neck = mmdet_twin.FPN(CHANNELS, WIDTH, 6 if extra else 4, norm=name, **options)
    if extra and norm is not None:  # the others' extra levels have no norm
        for level in (4, 5):
            neck.fpn_convs[level] = mmdet_twin.ConvModule(
                neck.fpn_convs[level].conv.in_channels, WIDTH, 3, 2, None, None
            )
    return neck


def _run(model: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    named = dict(zip(RES if isinstance(model, detectron2_twin.FPN) else NAMES, maps, strict=True))
    if isinstance(model, sam2_twin.FpnNeck):
        return model(maps)[0]
    result = model(tuple(maps) if isinstance(model, mmdet_twin.FPN) else named)
    return list(result) if isinstance(result, tuple) else list(result.values())


_WHOLE: dict[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "detectron2": _detectron2,
    "mmdet": _mmdet,
    "fpn_kernels": _own,
}


@pytest.mark.parametrize("extra", [False, True], ids=["4-levels", "p6p7"])
@pytest.mark.parametrize("norm", [None, _BN, group_norm], ids=["none", "bn", "gn"])
@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(_WHOLE, 2)])
def test_weights_load_strictly_and_compute_the_same(source: str, target: str, norm: Any, extra: bool) -> None:
    old, new = _WHOLE[source](norm, extra).eval(), _WHOLE[target](norm, extra).eval()
    scramble(old)
    state = old.state_dict()
    converted = convert_state_dict(state, source, target)
    new.load_state_dict(converted, strict=True)
    maps = _maps()
    with torch.no_grad():
        _assert_same(_run(new, maps), _run(old, maps))
    assert _ids(convert_state_dict(converted, target, source)) == _ids(state)


@pytest.mark.parametrize("target", ["torchvision", "detectron2", "mmdet"])
def test_missing_output_convolutions_become_the_identity(target: str) -> None:
    neck, model, maps = _sam2(), _WHOLE[target](), _maps()
    scramble(neck)
    state = neck.state_dict()
    converted = convert_state_dict(state, "sam2", target)
    model.load_state_dict(converted, strict=True)
    with torch.no_grad():
        _assert_same(_run(model, maps), _run(neck, maps))
    assert _ids(convert_state_dict(converted, target, "sam2")) == _ids(state)


def test_a_single_file_network_and_its_backbone() -> None:
    network = kuangliu_fpn101(4)
    scramble(network)
    original = network.state_dict()
    state = convert_state_dict(original, "kuangliu", "torchvision")
    fpn = fpn_kernels.FeaturePyramidNetwork([16, 32, 64, 128], OUT, mode="bilinear")
    fpn.load_state_dict({k: v for k, v in state.items() if k.startswith(("inner", "layer_"))}, strict=True)
    assert state["layer1.0.conv1.weight"] is original["layer1.0.conv1.weight"]
    network.eval()
    image, maps = torch.randn(1, 3, 75, 118), []
    for stage in range(1, 5):
        getattr(network, f"layer{stage}").register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        expected = network(image)
        _assert_same(fpn(maps), expected)
    kuangliu_fpn101(4).load_state_dict(convert_state_dict(state, "torchvision", "kuangliu"), strict=True)


def test_the_pyramid_of_a_segmentation_decoder() -> None:
    decoder, neck, maps = smp_twin.FPNDecoder(CHANNELS, WIDTH), _sam2(), _maps()
    state = convert_state_dict(decoder.state_dict(), "smp", "sam2")
    neck.load_state_dict({k: v for k, v in state.items() if not k.startswith("seg_blocks")}, strict=True)
    seen: list[Tensor] = []
    for level in (5, 4, 3, 2):
        getattr(decoder, f"p{level}").register_forward_hook(lambda module, inputs, output: seen.append(output))
    decoder(maps)
    _assert_same(neck(maps)[0], reversed(seen))
    decoder.load_state_dict(convert_state_dict(state, "sam2", "smp"), strict=True)


def test_prefixes_are_kept_and_other_keys_pass() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "backbone": nn.ModuleDict({"fpn": _torchvision()}), "b": _own()})
    state = model.state_dict()
    converted = convert_state_dict(state, "torchvision", "mmdet")
    assert converted["backbone.fpn.lateral_convs.2.conv.weight"] is state["backbone.fpn.inner_blocks.2.0.weight"]
    assert converted["b.fpn_convs.0.conv.bias"] is state["b.layer_blocks.0.0.bias"]
    assert converted["head.weight"] is state["head.weight"] and len(converted) == len(state)
    assert type(converted) is OrderedDict and "b.layer_blocks.0.0.bias" in state, "the caller's was changed"


_V1 = re.compile(r"((?:inner|layer)_blocks\.\d+)\.0\.")


def _older(state: dict[str, Any]) -> OrderedDict[str, Any]:
    """The keys of version 1 of torchvision's module, which has no norms."""
    older = OrderedDict((_V1.sub(r"\1.", key), value) for key, value in state.items())
    older._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return older


@pytest.mark.parametrize("target", _WHOLE)
@pytest.mark.parametrize("source", ["torchvision", "fpn_kernels"])
@pytest.mark.parametrize("extra", [False, True], ids=["4-levels", "p6p7"])
def test_keys_of_torchvisions_first_version(extra: bool, source: str, target: str) -> None:
    state = _torchvision(extra=extra).state_dict()
    older = _older(state)
    assert "inner_blocks.0.weight" in older and "layer_blocks.3.bias" in older
    converted = convert_state_dict(older, source, target)
    expected = convert_state_dict(state, source, target)
    assert _ids(converted) == _ids(expected)
    _WHOLE[target](extra=extra).load_state_dict(converted, strict=True)


@pytest.mark.parametrize("prefix", ["module.", "module.backbone.fpn.", "_orig_mod.module.neck."])
@pytest.mark.parametrize("older", [False, True])
def test_prefixes_of_wrappers_and_several_pyramids_of_two_versions(older: bool, prefix: str) -> None:
    first, second = _torchvision(extra=True).state_dict(), _torchvision().state_dict()
    state = {f"{prefix}{key}": value for key, value in (_older(first) if older else first).items()}
    state |= {f"other.{key}": value for key, value in second.items()} | {"module.head.0.weight": first}
    converted = convert_state_dict(state, "torchvision", "mmdet")
    assert converted[f"{prefix}lateral_convs.2.conv.weight"] is first["inner_blocks.2.0.weight"]
    assert converted[f"{prefix}fpn_convs.5.conv.bias"] is first["extra_blocks.p7.bias"]
    assert converted["other.fpn_convs.0.conv.weight"] is second["layer_blocks.0.0.weight"]
    assert converted["module.head.0.weight"] is first and len(converted) == len(state)


def test_the_versions_of_modules_are_kept() -> None:
    """A module, also one outside the pyramid, needs its version to load an older checkpoint."""
    model = nn.ModuleDict({"fpn": _torchvision(), "norm": nn.BatchNorm2d(4)})
    state = model.state_dict()
    state._metadata["norm"]["version"] = 7  # type: ignore[attr-defined]
    converted = convert_state_dict(state, "torchvision", "mmdet")
    assert converted._metadata == state._metadata  # type: ignore[attr-defined]
    assert not hasattr(convert_state_dict(dict(state), "torchvision", "mmdet"), "_metadata")


def test_a_weight_under_two_keys_is_refused() -> None:
    state = {"inner_blocks.0.weight": 0, "inner_blocks.0.0.weight": 0}
    with pytest.raises(ValueError, match="state: expected the keys of one version"):
        convert_state_dict(state, "torchvision", "mmdet")


def test_three_levels_are_numbered_from_stride_32_down() -> None:
    three = torchvision_twin.FeaturePyramidNetwork(CHANNELS[1:], WIDTH).state_dict()
    keys = set(convert_state_dict(three, "torchvision", "detectron2"))
    assert {"fpn_lateral3.weight", "fpn_output5.bias"} <= keys and "fpn_lateral2.weight" not in keys


@pytest.mark.parametrize(
    ("make", "source", "target", "message"),
    [
        (lambda: _torchvision().state_dict(), "torchvision", "sam2", "layer_blocks.0.0.weight has no place .*'sam2'"),
        (lambda: _torchvision().state_dict(), "torchvision", "kuangliu", "layer_blocks.3.0.weight has no place"),
        (lambda: _mmdet(_BN).state_dict(), "mmdet", "kuangliu", "lateral_convs.0.bn.weight has no place"),
        (lambda: _detectron2(None, True).state_dict(), "detectron2", "kuangliu", "has no place .*'kuangliu'"),
        (lambda: _torchvision().state_dict(), "mmdet", "torchvision", "state: holds no feature pyramid of 'mmdet'"),
        (lambda: {}, "torchvision", "mmdet", "state: holds no feature pyramid of 'torchvision'"),
        (lambda: {}, "torchvison", "mmdet", "source: expected one of .*'torchvision'.*got 'torchvison'"),
        (lambda: {}, "torchvision", "paddle", "target: expected one of .*got 'paddle'"),
        (
            lambda: {"fpn_lateral6.weight": 0, "fpn_lateral7.weight": 0},
            "detectron2",
            "mmdet",
            "state: expected fpn_lateral4.weight in a pyramid of 2 levels",
        ),
        (
            lambda: sam2_twin.FpnNeck(nn.Identity(), 4, [3, 3, 3]).state_dict(),
            "sam2",
            "smp",
            "a pyramid of 'smp' has 4 levels, this one has 3",
        ),
        (lambda: [], "torchvision", "mmdet", "state: expected a mapping of names to tensors, got list"),
        (lambda: {}, None, "mmdet", "source: expected the name of a dialect, got NoneType"),
        (lambda: {}, "mmdet", 2, "target: expected the name of a dialect, got int"),
    ],
)
def test_errors(make: Callable[[], Any], source: Any, target: Any, message: str) -> None:
    of_type = isinstance(make(), dict) and isinstance(source, str) and isinstance(target, str)
    with pytest.raises(ValueError if of_type else TypeError, match=message):
        convert_state_dict(make(), source, target)
