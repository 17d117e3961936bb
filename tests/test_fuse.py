"""`fuse` and `unfuse`: what a fused module keeps, what is left alone, and what the errors say."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign.torchvision_twin import BackboneWithFPN, FeaturePyramidNetwork
from fusion_cases import ONE_EACH, Case, leaves
from oracle import error
from torch import Tensor, nn
from twins import CHANNELS, NAMES, SIZES, WIDTH, assert_same, maps, scramble, served

import fpn_kernels
from fpn_kernels.interop.swapping import is_fused

ALL_FUSED = ["lateral_connection"] * 4
OUTPUTS = ["output_conv"]


def _network(cls: type[nn.Module] = FeaturePyramidNetwork, norm: Any = None) -> Any:
    network = cls(CHANNELS, WIDTH, None, norm)
    scramble(network)
    return network.eval()


def _calls(call: Callable[[], Any]) -> list[str]:
    return [name for name in served(call) if name not in OUTPUTS]


_one_each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)


# ----------------------------------------------------------------------------------------- what it keeps


@_one_each
def test_a_fused_module_is_what_it_was(case: Case) -> None:
    model = nn.Sequential(case.make())
    before = {name: module for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in before.items()}
    parameters, keys, text = list(model.parameters()), list(model.state_dict()), repr(model)
    attributes = {name: dict(module.__dict__) for name, module in before.items()}
    assert fpn_kernels.fuse(model) is model
    assert any(is_fused(module) for module in model.modules())
    for name, module in model.named_modules():
        assert module is before[name] and isinstance(module, classes[name])
        assert type(module).__name__ == classes[name].__name__ and module.__dict__ == attributes[name]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and repr(model) == text
    assert fpn_kernels.unfuse(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: module.__dict__ for name, module in model.named_modules()} == attributes


def _torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, copy.copy, _torch_save]
    + [lambda m, p=protocol: pickle.loads(pickle.dumps(m, protocol=p)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)],
    ids=["deepcopy", "copy", "torch.save", "pickle-0", "pickle-2", "pickle"],
)
@_one_each
def test_copies_are_fused_and_whole(case: Case, clone: Callable[[nn.Module], nn.Module]) -> None:
    model = case.make().eval()
    originals = [type(module) for module in model.modules()]
    fpn_kernels.fuse(model)
    example = case.example()
    with torch.no_grad():
        expected = leaves(model(*example))
        copied = clone(model)
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert _calls(lambda: copied(*example)) == case.calls
        for got, want in zip(leaves(copied(*example)), expected, strict=True):
            assert torch.equal(got, want)
        if clone is not copy.copy:
            next(copied.parameters()).zero_()
            assert torch.equal(leaves(model(*example))[0], expected[0])
    assert [type(module) for module in fpn_kernels.unfuse(copied).modules()] == originals


def test_an_optimiser_made_before_goes_on() -> None:
    twin, network = _network(norm=nn.BatchNorm2d).train(), None
    network = copy.deepcopy(twin)
    optimisers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in (twin, network)]
    for step in range(3):
        x = maps()
        if step == 1:
            fpn_kernels.fuse(network)
        if step == 2:
            fpn_kernels.unfuse(network)
        for model, optimiser in zip((twin, network), optimisers, strict=True):
            optimiser.zero_grad()
            sum(p.square().mean() for p in model(x).values()).backward()
            optimiser.step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(dict(network.named_parameters())[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["", "inner_blocks.1", "inner_blocks.1.0", "layer_blocks.2.0"])
def test_hooks_of_before_and_after_fire(where: str) -> None:
    twin = _network()
    network = copy.deepcopy(twin)
    seen: list[nn.Module] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        seen.append(module)
        return OrderedDict((k, 2 * v) for k, v in output.items()) if isinstance(output, dict) else 2 * output

    x = maps()
    for model in (twin, network):
        model.get_submodule(where).register_forward_hook(hook)
    fpn_kernels.fuse(network)
    assert seen == [], "the trial runs no hook"
    for model in (twin, network):
        model.get_submodule(where).register_forward_hook(hook)
    assert_same(network(x), twin(x))
    assert seen == 2 * [network.get_submodule(where)] + 2 * [twin.get_submodule(where)]


def test_a_convolution_replaced_after_fusing_is_called() -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    twin = _network()
    network = fpn_kernels.fuse(copy.deepcopy(twin))
    for model in (network, twin):
        model.inner_blocks[1][0].__class__ = Doubling
    x = maps()
    assert _calls(lambda: assert_same(network(x), twin(x))) == [*ALL_FUSED[:2], "upsample_add", ALL_FUSED[0]]


def test_modes_and_devices_move_as_before() -> None:
    network = fpn_kernels.fuse(_network().train())
    assert network.training and all(m.training for m in network.modules())
    assert not network.eval().training
    assert next(network.to("meta").parameters()).device.type == "meta"


def test_nothing_of_the_callers_state_is_touched() -> None:
    network = _network(norm=nn.BatchNorm2d).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x, random = maps(), torch.get_rng_state()
    fpn_kernels.fuse(network, verify=x)
    assert torch.equal(torch.get_rng_state(), random) and all(m.training for m in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_weights_without_values_can_be_fused() -> None:
    with torch.device("meta"):
        network = FeaturePyramidNetwork(CHANNELS, WIDTH)
    assert is_fused(fpn_kernels.fuse(network)) and next(network.parameters()).device.type == "meta"
    twin = _network()
    network.load_state_dict(twin.state_dict(), assign=True)
    x = maps()
    assert_same(network(x), twin(x))


# ------------------------------------------------------------------------------------- inside other things


def test_inside_a_model_shared_and_nested() -> None:
    shared = _network()

    class Nested(FeaturePyramidNetwork):
        """A pyramid that holds another one."""

        def __init__(self) -> None:
            super().__init__(CHANNELS, WIDTH)
            self.other = _network()

    model = nn.ModuleDict({"a": shared, "b": shared, "c": Nested()})
    _, report = fpn_kernels.fuse(model, report=True)
    assert list(report.fused) == ["a", "c", "c.other"] and not report.left
    assert model["a"] is model["b"] is shared and is_fused(model["b"])
    fpn_kernels.unfuse(model["b"])
    assert not is_fused(model["a"]) and is_fused(model["c"].other)


def test_a_backbone_with_odd_sizes_trains_and_detects_as_before() -> None:
    twin = BackboneWithFPN(CHANNELS, WIDTH)
    network = fpn_kernels.fuse(copy.deepcopy(twin), verify=torch.randn(1, 3, 99, 141))
    image = torch.randn(2, 3, 99, 141)
    results = [model(image) for model in (network, twin)]
    assert_same(*results)
    for result in results:
        sum(p.square().sum() for p in result.values()).backward()
    for (name, got), want in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert error(got.grad, want.grad.double()) < 2e-5, name


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        twin = _network().train()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(twin))
        fpn_kernels.fuse(wrapped)
        assert is_fused(wrapped.module)
        again = nn.parallel.DistributedDataParallel(fpn_kernels.fuse(copy.deepcopy(twin)))
        x = maps()
        for model in (wrapped, again, twin):
            sum(p.square().sum() for p in model(x).values()).backward()
        for model in (wrapped, again):
            for got, want in zip(model.parameters(), twin.parameters(), strict=True):
                assert error(got.grad, want.grad.double()) < 2e-5
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["compile then fuse", "fuse then compile"])
def test_torch_compile(order: str) -> None:
    network, x = _network(), maps()
    expected = network(x)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    if order == "compile then fuse":
        assert_same(compiled(x), expected)
    fpn_kernels.fuse(compiled)
    assert is_fused(network)
    with torch.no_grad():
        assert _calls(lambda: assert_same(compiled(x), expected)) == ALL_FUSED


def test_torch_export() -> None:
    network, x = fpn_kernels.fuse(_network()), maps()
    with torch.no_grad():
        program = torch.export.export(network, (x,))
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("fpn_kernels.lateral_connection.default") == 4
    assert_same(program.module()(x), network(x))


def test_torch_jit_script_says_what_to_do() -> None:
    model = nn.Sequential(fpn_kernels.fuse(_network()))
    with pytest.raises(TypeError, match=r"torch.jit.script cannot compile .* call fpn_kernels.unfuse\(model\)"):
        torch.jit.script(model)


# ---------------------------------------------------------------------------------------- what is left alone


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
    network = _network()
    network.forward = lambda x: x
    return network


def _fork(forward: Callable[..., Any]) -> nn.Module:
    """A class with torchvision's name and attributes and another forward."""
    fork = type("FeaturePyramidNetwork", (nn.Module,), {"forward": forward})()
    for name in ("inner_blocks", "layer_blocks", "extra_blocks"):
        setattr(fork, name, getattr(_network(), name))
    return fork


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _network(OwnForward), "OwnForward has a forward of its own"),
        (lambda: _network(OwnMethod), r"computes something else than .* \(output.*relative error"),
        (_patched, "a forward of its own was put on the instance"),
        (lambda: _fork(lambda self, x: list(x.values())), r"computes something else .* \(the output is"),
        (lambda: _fork(lambda self, x, masks: x), "could not be tried on a random input: TypeError"),
        (lambda: _fork(lambda self, x: {k: m.double() for k, m in x.items()}), "computes something else"),
    ],
    ids=["subclass", "method", "patched", "fork", "fork-arguments", "fork-dtype"],
)
def test_what_computes_something_else_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"left": make(), "fused": _network()})
    cls = type(model["left"])
    _, report = fpn_kernels.fuse(model, report=True)
    assert list(report.fused) == ["fused"] and type(model["left"]) is cls
    with pytest.raises(ValueError, match=f"no feature pyramid to fuse in ModuleDict .*left.*{reason}"):
        fpn_kernels.fuse(nn.ModuleDict({"left": make()}))


def test_a_subclass_that_changes_nothing_is_fused() -> None:
    network = fpn_kernels.fuse(_network(OwnName))
    assert is_fused(network) and isinstance(network, OwnName)


def test_a_network_with_the_right_names_and_another_resize_is_left() -> None:
    from resnet_twins import kuangliu_fpn101

    network = kuangliu_fpn101(4)
    network._upsample_add = lambda top, lateral: lateral + nn.functional.interpolate(
        top, lateral.shape[2:], mode="bilinear", align_corners=True
    )
    with pytest.raises(ValueError, match=r"the model itself \(single-file FPN.*computes something else"):
        fpn_kernels.fuse(network)


def test_scripted_pyramids_are_left() -> None:
    scripted = torch.jit.script(_Scriptable())
    with pytest.raises(ValueError, match="was compiled by torch.jit.script"):
        fpn_kernels.fuse(nn.Sequential(scripted))


class _Scriptable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


_Scriptable.__name__ = "FpnNeck"


def test_the_librarys_own_is_served_already() -> None:
    own = fpn_kernels.FeaturePyramidNetwork(CHANNELS, WIDTH)
    _, report = fpn_kernels.fuse(own, report=True)
    assert report.left == {"": "computes by the fused calls already"} and not is_fused(own)


def test_fusing_twice_is_fusing_once() -> None:
    network = fpn_kernels.fuse(_network())
    cls = type(network)
    _, report = fpn_kernels.fuse(network, report=True)
    assert type(network) is cls and report.left == {"": "is fused already"}
    assert type(fpn_kernels.unfuse(network)) is FeaturePyramidNetwork


@pytest.mark.parametrize("function", [fpn_kernels.fuse, fpn_kernels.unfuse])
def test_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        function({})


def test_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match=r"model: no feature pyramid to fuse in Sequential \(known: torchvision"):
        fpn_kernels.fuse(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert isinstance(fpn_kernels.unfuse(nn.Identity()), nn.Identity)


def test_a_class_derived_since_is_not_taken_apart() -> None:
    model = nn.ModuleDict({"a": fpn_kernels.fuse(_network()), "b": fpn_kernels.fuse(_network())})
    wrapped = type("FSDPFeaturePyramidNetwork", (type(model["b"]),), {})
    model["b"].__class__ = wrapped
    assert_same(model["b"](x := maps()), model["b"](x))
    with pytest.raises(ValueError, match="model: the class of b was changed to .* undo that first"):
        fpn_kernels.unfuse(model)
    assert is_fused(model["a"]), "nothing is half-done"


# --------------------------------------------------------------------------------- report, log and verification


def test_the_log_and_the_report_say_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"neck": _network(), "odd": _network(OwnForward)})
    with caplog.at_level(logging.INFO, logger="fpn_kernels"):
        _, report = fpn_kernels.fuse(model, report=True)
    lines = [
        "neck: fused (torchvision FeaturePyramidNetwork)",
        "odd: left, OwnForward has a forward of its own",
    ]
    assert str(report).splitlines() == lines
    assert [record.getMessage() for record in caplog.records] == [f"fuse: {line}" for line in lines]


class OtherWhenLarge(FeaturePyramidNetwork):
    """What the small trial does not show and the example does."""

    def get_result_from_inner_blocks(self, x: Tensor, idx: int) -> Tensor:
        result = super().get_result_from_inner_blocks(x, idx)
        return 1.1 * result if result.shape[-1] == 57 else result


@pytest.mark.parametrize("training", [False, True])
def test_verify_names_the_level_and_the_error_and_restores(training: bool) -> None:
    model = nn.ModuleDict({"good": _network(), "bad": _network(OtherWhenLarge)}).train(training)
    model.forward = lambda x: {name: module(x) for name, module in model.items()}
    with pytest.raises(RuntimeError, match=r"verify: bad: output\['0'\]: relative error 0\.\d+, above .*float32"):
        fpn_kernels.fuse(model, verify=maps())
    assert [type(m) for m in model.values()] == [FeaturePyramidNetwork, OtherWhenLarge]
    assert all(m.training == training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_verify_wants_an_example_that_reaches_the_pyramid() -> None:
    model = nn.ModuleDict({"used": _network(), "unused": _network()})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(RuntimeError, match="verify: unused: the example does not reach it"):
        fpn_kernels.fuse(model, verify=maps())
    assert not is_fused(model["used"])


def test_an_example_that_fails_changes_nothing() -> None:
    network = _network()
    with pytest.raises(RuntimeError, match="sparse"):  # what the model itself says of it
        fpn_kernels.fuse(network, verify=torch.zeros(1))
    assert type(network) is FeaturePyramidNetwork and not network._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_verify_allows_for_the_dtype(dtype: torch.dtype) -> None:
    network = _network(norm=nn.BatchNorm2d).to(dtype)
    x = OrderedDict((n, torch.randn(2, c, *s).to(dtype)) for n, c, s in zip(NAMES, CHANNELS, SIZES, strict=True))
    assert is_fused(fpn_kernels.fuse(network, verify=x))


def test_verify_under_autocast_and_with_a_tuple_of_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fpn = _network()

        def forward(self, x: Any, scale: float) -> Any:
            return self.fpn({name: scale * m for name, m in x.items()})

    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused(fpn_kernels.fuse(Two(), verify=(maps(), 0.5)).fpn)
