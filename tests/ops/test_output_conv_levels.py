"""`output_conv_levels`: levels of different kinds, levels that no loss uses, and the memory of training."""

from __future__ import annotations

import gc
import weakref

import oracle
import pytest
import torch
import torch.nn.functional as F
from samples import random_map
from targets import INTERPRETED, Target
from torch import Tensor
from twins import maps, pair

import fpn_kernels
from fpn_kernels import functional

SIZES = [(13, 18), (7, 9), (4, 5), (1, 2)]
if INTERPRETED:  # it takes a millisecond per instruction
    SIZES = [(5, 6), (3, 3), (2, 2), (1, 2)]


def _inputs(device: str = "cpu") -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    features = [random_map((2, 16, *size), torch.float32, device, "nhwc") for size in SIZES]
    weights = [random_map((24, 16, 3, 3), torch.float32, device) / 12 for _ in SIZES]
    return features, weights, [torch.randn(24, device=device) for _ in SIZES]


def test_levels_of_every_kind_at_once() -> None:
    """Batch, channels, layout and having a bias are each level's own; the dtype is not."""
    features = [
        random_map((2, 5, 9, 7), torch.float32),
        random_map((1, 3, 4, 4), torch.float32, layout="sliced-nhwc"),
        random_map((3, 8, 1, 6), torch.float32, layout="nhwc"),
    ]
    weights = [torch.randn(cout, f.shape[1], 3, 3) for cout, f in zip((4, 1, 9), features, strict=True)]
    biases = [None, torch.randn(1), torch.randn(9)]
    results = functional.output_conv_levels(features, weights, biases)
    for result, *level in zip(results, features, weights, biases, strict=True):
        alone = fpn_kernels.output_conv(*level)
        assert torch.equal(result, alone) and result.stride() == alone.stride()


@pytest.mark.parametrize("used", [(1,), (0, 3)], ids=str)
@pytest.mark.parametrize("group", [0, 1, 2], ids=["features", "weights", "biases"])
def test_gradients_of_the_levels_that_are_used(group: int, used: tuple[int, ...], target: Target) -> None:
    groups = _inputs(target.device)
    leaves = [tensor.requires_grad_() for tensor in groups[group]]
    with fpn_kernels.use_backend(target.backend):
        results = torch.ops.fpn_kernels.output_conv_levels(*groups, [0, 1, 2, 3])
        ours = torch.autograd.grad(sum((results[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    eager = [F.conv2d(*level, padding=1) for level in zip(*groups, strict=True)]
    theirs = torch.autograd.grad(sum((eager[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    for result, twin in zip(ours, theirs, strict=True):
        assert (result is None) == (twin is None)
        assert result is None or oracle.error(result, twin.double().cpu()) <= 1e-5


def test_training_keeps_no_level_longer_than_its_own_backward() -> None:
    """Each output convolution of a neck releases its merged map; the network with an identity holds nothing else."""
    network, _ = pair()
    merged = [torch.randn(1, 12, *size).requires_grad_() for size in ((9, 13), (5, 7), (3, 4), (2, 2))]
    weights = [block[0].weight for block in network.layer_blocks]
    saved = [weakref.ref(level) for level in merged]
    results = list(functional.output_conv_levels(merged, weights))
    del merged
    gc.collect()
    assert all(reference() is not None for reference in saved)
    for level in (2, 0):
        torch.autograd.grad(results[level].sum(), weights[level])
        results[level] = torch.empty(0)
    gc.collect()
    assert [saved[level]() is None for level in range(4)] == [True, False, True, False]


def test_a_profiled_step_takes_the_same_memory() -> None:
    """The levels are recorded one by one under a profiler, too."""
    groups = [[tensor.requires_grad_() for tensor in group] for group in _inputs()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        observed = functional.output_conv_levels(*groups)
    assert len({result.grad_fn for result in observed}) == len(SIZES)


def test_a_level_that_needs_no_gradient_has_no_node() -> None:
    features, weights, biases = _inputs()
    weights[1].requires_grad_()
    results = functional.output_conv_levels(features, weights, [None, *biases[1:]])
    assert [result.requires_grad for result in results] == [False, True, False, False]


def test_a_neck_of_maps_in_nhwc(target: Target) -> None:
    network, twin = (module.to(target.device) for module in pair())
    x = {name: m.to(target.device).contiguous(memory_format=torch.channels_last) for name, m in maps(1).items()}
    with fpn_kernels.use_backend(target.backend), torch.no_grad():
        outputs = network(x)
    for ours, theirs in zip(outputs.values(), twin(x).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operator", ["output_conv_levels", "top_down_pathway"])
@pytest.mark.parametrize("levels", [[0], [0, 4], [-1, 0]], ids=str)
def test_bad_levels_of_the_biases_are_named(levels: list[int], operator: str) -> None:
    features, weights, biases = _inputs()
    with pytest.raises(ValueError, match="bias_levels: expected"):
        getattr(torch.ops.fpn_kernels, operator)(features, weights, biases[:2], levels)
