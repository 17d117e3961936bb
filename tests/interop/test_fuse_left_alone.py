"""Pyramids that `fuse` leaves alone; its report, log, errors and verification."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign.torchvision_twin import FeaturePyramidNetwork
from fusion_cases import network_of
from resnet_twins import NamedLayersFPN, kuangliu_fpn101
from torch import Tensor, nn
from twins import CHANNELS, NAMES, SIZES, WIDTH, assert_same, maps

import fpn_kernels
from fpn_kernels.interop.swapping import is_fused


class OwnForward(FeaturePyramidNetwork):
    def forward(self, x: Any) -> Any:
        return {name: -p for name, p in super().forward(x).items()}


class OwnMethod(FeaturePyramidNetwork):
    """Overrides a method that the forward calls, not the forward."""

    def get_result_from_inner_blocks(self, x: Tensor, idx: int) -> Tensor:
        return super().get_result_from_inner_blocks(x, idx).relu()


class OwnName(FeaturePyramidNetwork):
    """Overrides nothing."""


def _patched() -> nn.Module:
    network = network_of()
    network.forward = lambda x: x
    return network


def _decorated() -> nn.Module:
    class Decorated(FeaturePyramidNetwork):
        @torch.no_grad()
        def forward(self, x: Any) -> Any:
            return super().forward(x)

    Decorated.__name__ = "FeaturePyramidNetwork"
    return network_of(Decorated)


def _fork(forward: Callable[..., Any]) -> nn.Module:
    """A class with torchvision's name and attributes and another forward."""
    forward.__qualname__ = "FeaturePyramidNetwork.forward"  # as if written in the class
    fork = type("FeaturePyramidNetwork", (nn.Module,), {"forward": forward})()
    for name in ("inner_blocks", "layer_blocks", "extra_blocks"):
        setattr(fork, name, getattr(network_of(), name))
    return fork


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: network_of(OwnForward), "OwnForward has a forward of its own"),
        (
            lambda: network_of(OwnMethod),
            "OwnMethod has a get_result_from_inner_blocks of its own, which the forward of FeaturePyramidNetwork calls",
        ),
        (_patched, "a forward of its own was put on the instance"),
        (_decorated, "the forward of FeaturePyramidNetwork was decorated or replaced"),
        (lambda: _fork(lambda self, x: list(x.values())), r"computes something else .* \(the output is"),
        (lambda: _fork(lambda self, x, masks: x), "could not be tried on a random input: TypeError"),
        (lambda: _fork(lambda self, x: {k: m.double() for k, m in x.items()}), "computes something else"),
    ],
    ids=["subclass", "method", "patched", "decorated", "fork", "fork-arguments", "fork-dtype"],
)
def test_another_computation_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"left": make(), "fused": network_of()})
    cls = type(model["left"])
    _, report = fpn_kernels.fuse(model, report=True)
    assert list(report.fused) == ["fused"] and type(model["left"]) is cls
    with pytest.raises(ValueError, match=f"no feature pyramid to fuse in ModuleDict .*left.*{reason}"):
        fpn_kernels.fuse(nn.ModuleDict({"left": make()}))


def test_a_subclass_that_changes_nothing_is_fused() -> None:
    network = fpn_kernels.fuse(network_of(OwnName))
    assert is_fused(network) and isinstance(network, OwnName)


def _other_resize() -> nn.Module:
    network = kuangliu_fpn101(4)
    network._upsample_add = lambda top, lateral: (
        lateral + nn.functional.interpolate(top, lateral.shape[2:], mode="bilinear", align_corners=True)
    )
    return network


class OtherResults(NamedLayersFPN):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *finer, p5 = super().forward(x)
        return (*finer, 2 * p5)


def _other_results() -> nn.Module:
    network = kuangliu_fpn101(4)
    network.__class__ = OtherResults
    return network


class _Scriptable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


_Scriptable.__name__ = "FpnNeck"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_other_resize, r"the model itself \(single-file FPN.*a _upsample_add of its own was put on the instance"),
        (_other_results, r"the model itself \(single-file FPN.*computes something else"),
        (lambda: torch.jit.script(_Scriptable()), "was compiled by torch.jit.script"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), r"no feature pyramid to fuse in Sequential \(known: torchvision"),
    ],
    ids=["resize", "results", "scripted", "none"],
)
def test_a_model_without_a_known_pyramid_is_an_error(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fpn_kernels.fuse(make())


def test_the_librarys_own_computes_by_fused_calls_already() -> None:
    own = fpn_kernels.FeaturePyramidNetwork(CHANNELS, WIDTH)
    _, report = fpn_kernels.fuse(own, report=True)
    assert report.left == {"": "computes by the fused calls already"} and not is_fused(own)


def test_fusing_twice_is_fusing_once() -> None:
    network = fpn_kernels.fuse(network_of())
    cls = type(network)
    _, report = fpn_kernels.fuse(network, report=True)
    assert type(network) is cls and report.left == {"": "is fused already"}
    assert type(fpn_kernels.unfuse(network)) is FeaturePyramidNetwork


@pytest.mark.parametrize("function", [fpn_kernels.fuse, fpn_kernels.unfuse])
def test_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        function({})


def test_unfusing_a_model_without_pyramids_does_nothing() -> None:
    assert isinstance(fpn_kernels.unfuse(nn.Identity()), nn.Identity)


def test_a_class_derived_since_is_not_taken_apart() -> None:
    model = nn.ModuleDict({"a": fpn_kernels.fuse(network_of()), "b": fpn_kernels.fuse(network_of())})
    wrapped = type("FSDPFeaturePyramidNetwork", (type(model["b"]),), {})
    model["b"].__class__ = wrapped
    assert_same(model["b"](x := maps()), model["b"](x))
    with pytest.raises(ValueError, match="model: the class of b was changed to .* undo that first"):
        fpn_kernels.unfuse(model)
    assert is_fused(model["a"]), "nothing is half-done"


# --------------------------------------------------------------------------------- report, log and verification


def test_the_log_and_the_report(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"neck": network_of(), "odd": network_of(OwnForward)})
    with caplog.at_level(logging.INFO, logger="fpn_kernels"):
        _, report = fpn_kernels.fuse(model, report=True)
    lines = [
        "neck: fused (torchvision FeaturePyramidNetwork)",
        "odd: left, OwnForward has a forward of its own",
    ]
    assert str(report).splitlines() == lines
    assert [record.getMessage() for record in caplog.records] == [f"fuse: {line}" for line in lines]


class OtherWhenLarge(FeaturePyramidNetwork):
    """A fork whose difference only the example shows, not the small trial."""

    def forward(self, x: Any) -> Any:
        results = super().forward(x)
        if results["0"].shape[-1] == 57:
            results["0"] = 1.1 * results["0"]
        return results


OtherWhenLarge.__name__ = "FeaturePyramidNetwork"


@pytest.mark.parametrize("training", [False, True])
def test_verify_names_the_level_and_the_error_and_restores(training: bool) -> None:
    model = nn.ModuleDict({"good": network_of(), "bad": network_of(OtherWhenLarge)}).train(training)
    model.forward = lambda x: {name: module(x) for name, module in model.items()}
    with pytest.raises(RuntimeError, match=r"verify: bad: output\['0'\]: relative error 0\.\d+, above .*float32"):
        fpn_kernels.fuse(model, verify=maps())
    assert [type(m) for m in model.values()] == [FeaturePyramidNetwork, OtherWhenLarge]
    assert all(m.training == training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def _detach(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A hook that stops the gradient in training."""
    stops = module.training and is_fused(module)
    return OrderedDict((name, p.detach() if stops else p) for name, p in output.items())


def _move_a_mean(module: nn.Module, inputs: Any) -> None:
    if module.training and is_fused(module):
        module.inner_blocks[0][1].running_mean.add_(1.0)


@pytest.mark.parametrize(
    ("kind", "hook", "message"),
    [
        ("forward", _detach, "training step 0: the gradient of .* is missing"),
        ("forward_pre", _move_a_mean, r"training step 0: buffer\['inner_blocks.0.1.running_mean'\]: relative"),
    ],
    ids=["gradient", "buffer"],
)
def test_verify_compares_training_too(kind: str, hook: Any, message: str) -> None:
    network = network_of(norm=nn.BatchNorm2d).train()
    getattr(network, f"register_{kind}_hook")(hook)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"verify: the model itself: {message}"):
        fpn_kernels.fuse(network, verify=maps())
    assert type(network) is FeaturePyramidNetwork and network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_verify_says_where_training_cannot_be_compared(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(module: nn.Module, inputs: Any) -> None:
        if module.training:
            raise RuntimeError("not here")

    network = network_of()
    network.register_forward_pre_hook(refuse)
    with caplog.at_level(logging.WARNING, logger="fpn_kernels"):
        assert is_fused(fpn_kernels.fuse(network, verify=maps()))
    assert "training was not compared, RuntimeError: not here" in caplog.text


def test_verify_requires_an_example_that_reaches_the_pyramid() -> None:
    model = nn.ModuleDict({"used": network_of(), "unused": network_of()})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(RuntimeError, match="verify: unused: the example does not reach it"):
        fpn_kernels.fuse(model, verify=maps())
    assert not is_fused(model["used"])


def test_an_example_that_fails_changes_nothing() -> None:
    network = network_of()
    with pytest.raises(RuntimeError, match="sparse"):  # the model's own error
        fpn_kernels.fuse(network, verify=torch.zeros(1))
    assert type(network) is FeaturePyramidNetwork and not network._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_verify_allows_for_the_dtype(dtype: torch.dtype) -> None:
    network = network_of(norm=nn.BatchNorm2d).to(dtype)
    x = OrderedDict((n, torch.randn(2, c, *s).to(dtype)) for n, c, s in zip(NAMES, CHANNELS, SIZES, strict=True))
    assert is_fused(fpn_kernels.fuse(network, verify=x))


def test_verify_under_autocast_and_with_a_tuple_of_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fpn = network_of()

        def forward(self, x: Any, scale: float) -> Any:
            return self.fpn({name: scale * m for name, m in x.items()})

    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused(fpn_kernels.fuse(Two(), verify=(maps(), 0.5)).fpn)
