"""`fuse` and `unfuse`: a fused module keeps its state and works with copies, wrappers and compilers."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alterations import CONVOLUTION_EDITS
from foreign.torchvision_twin import FeaturePyramidNetwork
from fusion_cases import ONE_EACH, Case, leaves, network_of
from oracle import error
from torch import nn
from twins import CHANNELS, WIDTH, assert_same, maps, served

import fpn_kernels
from fpn_kernels.interop.swapping import is_fused

ALL_FUSED = ["lateral_connection"] * 4


_one_each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)


def _assert_same_gradients(twin: nn.Module, network: nn.Module, x: Any, limit: float = 2e-5) -> None:
    for model in (network, twin):
        sum(p.square().sum() for p in model(x).values()).backward()
    for (name, got), want in zip(network.named_parameters(), twin.parameters(), strict=True):
        grad = got.grad.to_local() if hasattr(got.grad, "to_local") else got.grad
        assert error(grad, want.grad.double()) < limit, name


# ----------------------------------------------------------------------------------------------- the module


@_one_each
def test_a_fused_module_is_what_it_was(case: Case) -> None:
    model = nn.Sequential(case.make())
    before = dict(model.named_modules())
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


@_one_each
def test_copies_are_fused_and_complete(case: Case) -> None:
    model = case.make().eval()
    originals = [type(module) for module in model.modules()]
    fpn_kernels.fuse(model)
    example = case.example()
    pickled = [pickle.loads(pickle.dumps(model, protocol=n)) for n in (0, 2, pickle.HIGHEST_PROTOCOL)]
    with torch.no_grad():
        expected = leaves(model(*example))
        for copied in (copy.copy(model), copy.deepcopy(model), _torch_save(model), *pickled):
            assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
            assert served(lambda copied=copied: copied(*example)) == case.calls
            for got, want in zip(leaves(copied(*example)), expected, strict=True):
                assert torch.equal(got, want)
        next(copied.parameters()).zero_()
        assert torch.equal(leaves(model(*example))[0], expected[0])
    assert [type(module) for module in fpn_kernels.unfuse(copied).modules()] == originals


def test_an_optimiser_made_before_continues() -> None:
    twin = network_of(norm=nn.BatchNorm2d).train()
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
def test_hooks_added_before_and_after_run(where: str) -> None:
    twin = network_of()
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


def test_weights_without_values_can_be_fused() -> None:
    with torch.device("meta"):
        network = FeaturePyramidNetwork(CHANNELS, WIDTH)
    assert is_fused(fpn_kernels.fuse(network)) and next(network.parameters()).device.type == "meta"
    twin = network_of()
    network.load_state_dict(twin.state_dict(), assign=True)
    x = maps()
    assert_same(network(x), twin(x))


@pytest.mark.parametrize("edit", ["adapter", "patched forward", "weight norm", "old spectral norm"])
@pytest.mark.parametrize("first", ["edit", "fuse"])
def test_convolutions_edited_before_or_after_are_called_and_trained(edit: str, first: str) -> None:
    def edit_it(model: Any) -> None:
        torch.manual_seed(1)
        block = model.inner_blocks[1]
        block[0] = CONVOLUTION_EDITS.get(edit, nn.utils.spectral_norm)(block[0])

    twin = network_of()
    network = copy.deepcopy(twin)
    for step in (edit_it, fpn_kernels.fuse) if first == "edit" else (fpn_kernels.fuse, edit_it):
        step(network)
    edit_it(twin)
    assert is_fused(network) and not is_fused(twin)
    x = maps()
    calls = served(lambda: assert_same(network(x), twin(x)))
    assert calls == [*ALL_FUSED[:2], "upsample_add", ALL_FUSED[0]], "the other levels stay fused"
    _assert_same_gradients(twin, network, x, 1e-4)


_READER = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
x = torch.load(sys.argv[2], weights_only=False)
from fpn_kernels.operators.dispatch import record_calls
with torch.no_grad(), record_calls() as calls:
    torch.save(model(x), sys.argv[2])
assert [name for name, _ in calls if name != "output_conv"] == ["lateral_connection"] * 4, calls
absent = ["torchvision", "detectron2", "mmdet", "sam2", "segmentation_models_pytorch", "effdet"]
assert not set(absent) & set(sys.modules)
"""


def test_a_saved_model_loads_in_a_process_that_never_fused(tmp_path: Path) -> None:
    network, x = fpn_kernels.fuse(network_of(norm=nn.BatchNorm2d)), maps()
    torch.save(network, tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _READER, str(tmp_path / "model.pt"), str(tmp_path / "x.pt")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_same(torch.load(tmp_path / "x.pt", weights_only=False), network(x))


# ------------------------------------------------------------------------------------- inside other things


def test_inside_a_model_shared_and_nested() -> None:
    shared = network_of()

    class Nested(FeaturePyramidNetwork):
        """A pyramid that holds another one."""

        def __init__(self) -> None:
            super().__init__(CHANNELS, WIDTH)
            self.other = network_of()

    model = nn.ModuleDict({"a": shared, "b": shared, "c": Nested()})
    _, report = fpn_kernels.fuse(model, report=True)
    assert list(report.fused) == ["a", "c", "c.other"] and not report.left
    assert model["a"] is model["b"] is shared and is_fused(model["b"])
    fpn_kernels.unfuse(model["b"])
    assert not is_fused(model["a"]) and is_fused(model["c"].other)


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel() -> None:
    twin = network_of().train()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(twin))
    fpn_kernels.fuse(wrapped)
    assert is_fused(wrapped.module)
    again = nn.parallel.DistributedDataParallel(fpn_kernels.fuse(copy.deepcopy(twin)))
    x = maps()
    _assert_same_gradients(twin, wrapped, x)
    twin.zero_grad()
    _assert_same_gradients(twin, again, x)


@pytest.mark.usefixtures("_one_process")
def test_fully_sharded_data_parallel() -> None:
    twin, x = network_of().train(), maps()
    network = fpn_kernels.fuse(copy.deepcopy(twin))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(network, mesh=mesh)  # which changes the class once more
    assert served(lambda: assert_same(network(x), twin(x))) == ALL_FUSED
    _assert_same_gradients(twin, network, x)
    with pytest.raises(ValueError, match="the class of the model itself was changed to .*FSDP.* undo that first"):
        fpn_kernels.unfuse(network)


@pytest.mark.parametrize("order", ["compile then fuse", "fuse then compile"])
def test_torch_compile(order: str) -> None:
    network, x = network_of(), maps()
    expected = network(x)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    if order == "compile then fuse":
        assert_same(compiled(x), expected)
    fpn_kernels.fuse(compiled)
    assert is_fused(network)
    with torch.no_grad():
        assert served(lambda: assert_same(compiled(x), expected)) == ALL_FUSED


def test_torch_export() -> None:
    network, x = fpn_kernels.fuse(network_of()), maps()
    with torch.no_grad():
        program = torch.export.export(network, (x,))
    assert "fpn_kernels.top_down_pathway.default" in {str(node.target) for node in program.graph.nodes}
    assert_same(program.module()(x), network(x))
