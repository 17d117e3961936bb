"""Training over several processes and with checkpointing: the gradients are those of one process."""

from __future__ import annotations

import copy
import os
import pathlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from targets import INTERPRETED
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from twins import CHANNELS, WIDTH, group_norm, maps

from fpn_kernels import FeaturePyramidNetwork

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
WORLD = 2


def _network(norm_layer: Callable[[int], nn.Module] | None = None, mode: str = "nearest") -> FeaturePyramidNetwork:
    torch.manual_seed(1)
    return FeaturePyramidNetwork(CHANNELS, WIDTH, None, norm_layer, mode=mode)


def _features() -> OrderedDict[str, Tensor]:
    torch.manual_seed(2)
    return maps(2 * WORLD)


def _loss(pyramid: OrderedDict[str, Tensor]) -> Tensor:
    """A mean over images: that of the joined batch is the mean over the processes."""
    return sum(((x**2).mean() for x in pyramid.values()), torch.zeros(()))


def _share(features: OrderedDict[str, Tensor], rank: int) -> OrderedDict[str, Tensor]:
    return OrderedDict((name, x.chunk(WORLD)[rank].clone()) for name, x in features.items())


def _expected() -> dict[str, Tensor]:
    network = _network()
    _loss(network(_features())).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def _process(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    # A file, where a port would be a race between tests that run side by side.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        network: Any = _network()
        if kind == "ddp":
            network = DistributedDataParallel(network)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (WORLD,))
            for block in network.layer_blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
        _loss(network(_share(_features(), rank))).backward()
        gradients = {
            name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in network.named_parameters()
        }
        torch.save(gradients, pathlib.Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _spawn(folder: pathlib.Path, kind: str) -> list[dict[str, Tensor]]:
    # Spawned: a forked child would take over the threads' locks of this process.
    mp.spawn(_process, args=(str(folder), kind), nprocs=WORLD, join=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _check(shares: list[dict[str, Tensor]]) -> None:
    expected = _expected()
    for gradients in shares:
        assert list(gradients) == list(expected)
        for name, wanted in expected.items():
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-4, atol=1e-6 + 1e-5 * float(wanted.abs().max()))


@pytest.mark.nightly
@needs_gloo
def test_data_parallel_gradients_are_those_of_the_joined_batch(tmp_path: pathlib.Path) -> None:
    _check(_spawn(tmp_path, "ddp"))


@pytest.mark.nightly
@needs_gloo
def test_fully_sharded_gradients_are_those_of_the_joined_batch(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP")
    _check(_spawn(tmp_path, "fsdp"))


# ------------------------------------------------------------------------------------ activation checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d, group_norm], ids=["none", "batch", "group"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_activation_checkpointing(
    mode: str, norm_layer: Callable[[int], nn.Module] | None, use_reentrant: bool
) -> None:
    """A recomputed result has the same bits, and so have the gradients."""
    network = _network(norm_layer, mode)
    plain = copy.deepcopy(network)
    features = OrderedDict((name, x.requires_grad_()) for name, x in maps(2).items())
    twins = OrderedDict((name, x.detach().clone().requires_grad_()) for name, x in features.items())

    def run(*levels: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(OrderedDict(zip(features, levels, strict=True))).values())

    results = checkpoint(run, *features.values(), use_reentrant=use_reentrant)
    expected = tuple(plain(twins).values())
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    torch.autograd.backward(expected, [torch.ones_like(x) for x in expected])
    for (name, ours), theirs in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad), name
    for name, feature in features.items():
        assert feature.grad is not None and torch.equal(feature.grad, twins[name].grad), name


def test_checkpointing_keeps_the_features_alone() -> None:
    network, features = _network(), maps(2, grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpoint(lambda *x: tuple(network(list(x))), *features.values(), use_reentrant=True)
    kept = {x.untyped_storage().data_ptr() for x in saved}
    assert kept <= {x.untyped_storage().data_ptr() for x in features.values()}
    assert os.environ.get("RANK") is None, "a test left its process group's environment"
