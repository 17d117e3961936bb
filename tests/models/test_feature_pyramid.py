"""`FeaturePyramidNetwork` against a plain PyTorch twin that is built, keyed and run as torchvision's."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from fusion_cases import assert_same_gradients
from oracle import error, rounding
from targets import Target
from torch import Tensor, nn
from twins import CHANNELS, NAMES, SIZES, WIDTH, Twin, assert_same, group_norm, maps, pair, served

from fpn_kernels.modules import (
    FeaturePyramidNetwork,
    FrozenBatchNorm2d,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from fpn_kernels.operators.dispatch import record_calls, use_backend

# ---------------------------------------------------------------------------------------------- checkpoints


def test_keys_are_those_of_torchvision() -> None:
    tensors = ["weight", "bias"]
    keys = [f"{kind}_blocks.{n}.0.{name}" for kind in ("inner", "layer") for n in range(4) for name in tensors]
    keys += [f"extra_blocks.{level}.{name}" for level in ("p6", "p7") for name in tensors]
    assert list(FeaturePyramidNetwork(CHANNELS, WIDTH, LastLevelP6P7(WIDTH, WIDTH)).state_dict()) == keys
    tensors = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    keys = [f"{kind}_blocks.0.{name}" for kind in ("inner", "layer") for name in tensors]
    assert list(FeaturePyramidNetwork([8], 4, None, nn.BatchNorm2d).state_dict()) == keys


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d, FrozenBatchNorm2d, group_norm])
def test_checkpoints_load_strictly_both_ways_and_seeds_agree(norm_layer: Any) -> None:
    networks = []
    for cls in (FeaturePyramidNetwork, Twin):
        torch.manual_seed(5)
        networks.append(cls(CHANNELS, WIDTH, LastLevelP6P7(CHANNELS[-1], WIDTH), norm_layer))
    network, twin = networks
    for name, value in twin.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    network.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(network.state_dict(), strict=True)


def test_frozen_batch_norm_takes_a_batch_norm_checkpoint() -> None:
    source, _ = pair(nn.BatchNorm2d)
    frozen = FeaturePyramidNetwork(CHANNELS, WIDTH, None, FrozenBatchNorm2d)
    frozen.load_state_dict(source.state_dict(), strict=True)
    x = maps()
    assert_same(frozen(x), source(x))


@pytest.mark.parametrize("prefix", ["", "backbone.fpn."])
def test_version_1_checkpoints_are_migrated(prefix: str) -> None:
    network, twin = pair()
    old = OrderedDict(
        (f"{prefix}{blocks}.{level}.{name}", twin.state_dict()[f"{blocks}.{level}.0.{name}"])
        for blocks in ("inner_blocks", "layer_blocks")
        for level in range(4)
        for name in ("weight", "bias")
    )
    fresh = FeaturePyramidNetwork(CHANNELS, WIDTH)
    holder = nn.ModuleDict({"backbone": nn.ModuleDict({"fpn": fresh})}) if prefix else fresh
    before = list(old)
    holder.load_state_dict(old, strict=True)
    assert list(old) == before, "the caller's checkpoint was changed"
    x = maps()
    assert_same(fresh(x), network(x))


# ------------------------------------------------------------------------------------------------- numbers


def test_pyramid_on_every_backend(target: Target) -> None:
    network, twin = pair(device=target.device)
    x = maps(1, device=target.device)
    exact = copy.deepcopy(twin).double()
    # Channels last: there eager takes the float32 source index in float64 too.
    wide = {name: m.double().contiguous(memory_format=torch.channels_last) for name, m in x.items()}
    with torch.no_grad(), use_backend(target.backend), record_calls() as calls:
        actual = network(x)
    assert {backend for operator, backend in calls if operator == target.pathway()} == {target.backend}
    with torch.no_grad():
        expected, truth = twin(x), exact(wide)
    for name in NAMES:
        bound = 1.1 * error(expected[name], truth[name].cpu()) + rounding(torch.float32)
        assert error(actual[name], truth[name].cpu()) <= bound, name


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_modes_and_fuse_types(mode: str, fuse_type: str) -> None:
    network, twin = pair(mode=mode, fuse_type=fuse_type)
    x = maps()
    with torch.no_grad():
        assert_same(network(x), twin(x))
        assert served(lambda: network(x)) == ["lateral_connection"] * 4


@pytest.mark.parametrize(
    "norm_layer", [None, nn.BatchNorm2d, FrozenBatchNorm2d, group_norm], ids=["none", "bn", "frozen", "gn"]
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_equal_the_twins(norm_layer: Any, training: bool) -> None:
    network, twin = pair(norm_layer)
    network.train(training), twin.train(training)
    assert_same_gradients(network, twin, (maps(),))


def test_only_the_required_gradients() -> None:
    network, _ = pair(nn.BatchNorm2d)
    network.inner_blocks.requires_grad_(False)
    x = maps()
    x["2"].requires_grad_()
    sum(p.sum() for p in network(x).values()).backward()
    assert x["2"].grad is not None and x["0"].grad is None
    assert network.inner_blocks[0][0].weight.grad is None and network.layer_blocks[0][0].weight.grad is not None


@pytest.mark.parametrize("sizes", [[(1, 1)] * 4, [(7, 1), (3, 1), (1, 1), (1, 1)], [(4, 5), (9, 3), (2, 2), (6, 1)]])
def test_any_sizes(sizes: list[tuple[int, int]]) -> None:
    network, twin = pair()
    x = OrderedDict((n, torch.randn(1, c, *s)) for n, c, s in zip(NAMES, CHANNELS, sizes, strict=True))
    with torch.no_grad():
        assert_same(network(x), twin(x))


def test_empty_batch() -> None:
    network, _ = pair(nn.BatchNorm2d)
    x = maps(0, grad=True)
    results = network(x)
    assert [tuple(p.shape) for p in results.values()] == [(0, WIDTH, *size) for size in SIZES]
    sum(p.sum() for p in results.values()).backward()
    assert x["0"].grad is not None and network.inner_blocks[0][0].weight.grad.abs().max() == 0


def test_one_level() -> None:
    (result,) = FeaturePyramidNetwork([8], 4)([torch.randn(1, 8, 5, 5)])
    assert result.shape == (1, 4, 5, 5)


# ---------------------------------------------------------------------------------- arguments and results


def test_a_mapping_gives_an_ordered_dict_and_a_sequence_a_tuple() -> None:
    network = FeaturePyramidNetwork(CHANNELS, WIDTH, LastLevelMaxPool())
    named: dict[Any, Tensor] = dict(zip(["res2", 3, "res4", "res5"], maps().values(), strict=True))
    listed = list(named.values())
    by_name, by_list, by_tuple = network(named), network(listed), network(tuple(listed))
    assert type(by_name) is OrderedDict and list(by_name) == ["res2", 3, "res4", "res5", "pool"]
    assert type(by_list) is tuple and type(by_tuple) is tuple and len(by_list) == 5
    for a, b, c in zip(by_name.values(), by_list, by_tuple, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert len(named) == 4 and len(listed) == 4, "the caller's containers were changed"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts(memory_format: torch.memory_format) -> None:
    network, twin = pair()
    x = OrderedDict((n, m.contiguous(memory_format=memory_format)) for n, m in maps().items())
    with torch.no_grad():
        actual = network.to(memory_format=memory_format)(x)
        assert_same(actual, twin(x))
    assert all(p.is_contiguous(memory_format=memory_format) for p in actual.values())


def test_torchvisions_public_helpers() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()["1"]
    inner = network.get_result_from_inner_blocks(x, 1)
    assert torch.equal(inner, twin.inner_blocks[1](x))
    assert torch.equal(network.get_result_from_inner_blocks(x, -3), inner)
    assert torch.equal(network.get_result_from_layer_blocks(inner, -1), twin.layer_blocks[3](inner))
    with pytest.raises(IndexError, match="idx: 4"):
        network.get_result_from_layer_blocks(inner, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error_type", "message"),
    [
        (([], 4), {}, ValueError, "in_channels_list: expected at least one level"),
        ((8, 4), {}, TypeError, "in_channels_list: expected a sequence"),
        (([8, 0], 4), {}, ValueError, r"in_channels_list\[1\]: in_channels=0 is currently not supported"),
        (([8, -1], 4), {}, ValueError, r"in_channels_list\[1\]: expected at least 1, got -1"),
        (([8.0], 4), {}, TypeError, r"in_channels_list\[0\]: expected an integer, got float"),
        (([8], 0), {}, ValueError, "out_channels: expected at least 1, got 0"),
        (([8], "4"), {}, TypeError, "out_channels: expected an integer, got str"),
        (([8], 4, nn.Identity()), {}, TypeError, "extra_blocks: expected an ExtraFPNBlock or None, got Identity"),
        (([8], 4, LastLevelMaxPool), {}, TypeError, "extra_blocks: .*got type"),
        (([8], 4, None, nn.BatchNorm2d(4)), {}, TypeError, "norm_layer: expected a callable .*got BatchNorm2d"),
        (([8], 4, None, "BN"), {}, TypeError, "norm_layer: expected a callable .*got str"),
        (
            ([8], 4, None, lambda channels: channels),
            {},
            TypeError,
            "norm_layer: expected it to return a Module, got int",
        ),
        (([8], 4), {"mode": "bicubic"}, ValueError, "mode: .*nearest-exact.*got 'bicubic'"),
        (([8], 4), {"mode": 2}, TypeError, "mode: .*got int"),
        (([8], 4), {"fuse_type": "mean"}, ValueError, "fuse_type: .*'sum', 'avg'.*got 'mean'"),
        (([8], 4), {"fuse_type": None}, TypeError, "fuse_type: .*got NoneType"),
    ],
)
def test_constructor_errors(arguments: Any, options: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        FeaturePyramidNetwork(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "error_type", "message"),
    [
        (maps()["0"], TypeError, "x: expected a mapping, list or tuple .*got Tensor"),
        ({}, ValueError, "x: expected 4 feature maps.*got 0"),
        ([], ValueError, "x: expected 4 feature maps.*got 0"),
        ([*maps().values()][:3], ValueError, "x: expected 4 feature maps.*got 3"),
        ({**maps(), "1": None}, TypeError, r"x\['1'\]: expected a Tensor for level 1, got NoneType"),
        ({**maps(), "2": torch.zeros(16, 4, 4)}, ValueError, r"x\['2'\]: .*level 2, got shape \(16, 4, 4\)"),
        ({**maps(), "1": torch.zeros(2, 13, 19, 29)}, ValueError, r"x\['1'\]: expected 12 channels .*level 1, got 13"),
        ([*maps().values()][::-1], ValueError, r"x\[0\]: expected 8 channels for level 0, got 20"),
        ({**maps(), "1": torch.zeros(2, 12, 0, 29)}, ValueError, "at least one pixel"),
        ({**maps(), "3": torch.zeros(1, 20, 5, 8)}, ValueError, r"features\[3\].*batch"),
        (maps(dtype=torch.float16), TypeError, "float16"),
        ({n: m.long() for n, m in maps().items()}, TypeError, "int64"),
    ],
)
def test_call_errors(x: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        FeaturePyramidNetwork(CHANNELS, WIDTH)(x)


# ---------------------------------------------------------------------------------------- PyTorch citizenship


def test_copies_are_complete_and_independent() -> None:
    network, _ = pair(nn.BatchNorm2d, mode="bilinear", fuse_type="avg")
    x = maps()
    before = network(x)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert_same(copied(x), before)
        with torch.no_grad():
            copied.inner_blocks[0][0].weight.zero_()
        assert_same(network(x), before)


# In `make test` the folded norm, which runs the most code of this library, without the compilation of a backward.
@pytest.mark.parametrize(
    ("norm_layer", "grad"),
    [
        (nn.BatchNorm2d, False),
        *(pytest.param(norm, True, marks=pytest.mark.nightly) for norm in (None, nn.BatchNorm2d, group_norm)),
    ],
)
def test_compiles_without_a_graph_break_and_exports(norm_layer: Any, grad: bool) -> None:
    network, twin = pair(norm_layer)
    network.extra_blocks = twin.extra_blocks = LastLevelMaxPool()
    x = maps()
    y = OrderedDict((n, torch.randn(3, m.shape[1], m.shape[2] + 1, m.shape[3] + 2)) for n, m in x.items())
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert_same(compiled(x), twin(x))
        assert_same(compiled(y), twin(y))
    with torch.no_grad():
        program = torch.export.export(network, (x,))
    operator = "upsample_add" if norm_layer is group_norm else "top_down_pathway"
    assert f"fpn_kernels.{operator}.default" in {str(node.target) for node in program.graph.nodes}
    assert_same(program.module()(x), twin(x))


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d, group_norm])
def test_autocast(norm_layer: Any) -> None:
    network, twin = pair(norm_layer)
    x = maps()
    with torch.no_grad():
        truth = twin(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual, eager = network(x), twin(x)
    for name in NAMES:
        assert actual[name].dtype == eager[name].dtype
        # Eager carries the pathway in float32 here, the library in bfloat16: a few roundings more are its promise.
        assert error(actual[name], truth[name].double()) <= 8 * rounding(torch.bfloat16), name
    assert error(eager["0"], truth["0"].double()) > 0
