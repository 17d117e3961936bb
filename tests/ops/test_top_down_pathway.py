"""`top_down_pathway`: the bits of chained lateral connections, levels that no loss uses, and compiled training."""

from __future__ import annotations

import shutil

import oracle
import pytest
import torch
from samples import random_map
from targets import INTERPRETED, Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference

SIZES, CHANNELS = ([(30, 45), (15, 23), (8, 12), (4, 6)], [4, 8, 12, 16])
if INTERPRETED:  # it takes a millisecond per instruction
    SIZES, CHANNELS = SIZES[2:], CHANNELS[2:]


def _inputs(
    dtype: torch.dtype = torch.float32, device: str = "cpu", layout: str = "nchw"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    features = [random_map((2, c, *size), dtype, device, layout) for c, size in zip(CHANNELS, SIZES, strict=True)]
    weights = [random_map((10, c, 1, 1), dtype, device) / c**0.5 for c in CHANNELS]
    return features, weights, [torch.randn(10, device=device).to(dtype) for _ in CHANNELS]


def _leaves(groups: tuple[list[Tensor], ...]) -> list[Tensor]:
    return [tensor.requires_grad_() for group in groups for tensor in group]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_the_bits_of_chained_lateral_connections(mode: str, target: Target) -> None:
    features, weights, biases = _inputs(device=target.device)
    with fpn_kernels.use_backend(target.backend):
        for given in (biases, [None] * len(biases)):
            merged = fpn_kernels.top_down_pathway(features, weights, given, mode=mode, gain=0.5)
            top = None
            for level in reversed(range(len(SIZES))):
                options = {"mode": mode, "gain": 0.5}
                top = fpn_kernels.lateral_connection(features[level], weights[level], given[level], top, **options)
                assert torch.equal(merged[level], top)
    assert isinstance(merged, tuple)


@pytest.mark.parametrize("used", [(0,), (-1,), (0, -1)], ids=str)
def test_gradients_where_some_levels_are_used(used: tuple[int, ...], target: Target) -> None:
    groups = _inputs(device=target.device)
    leaves = _leaves(groups)
    with fpn_kernels.use_backend(target.backend):
        merged = fpn_kernels.top_down_pathway(*groups, gain=0.5)
        ours = torch.autograd.grad(sum((merged[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    expected = reference.top_down_pathway(*groups, gain=0.5)
    theirs = torch.autograd.grad(sum((expected[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    for result, twin in zip(ours, theirs, strict=True):
        assert (result is None) == (twin is None)
        assert result is None or oracle.error(result, twin.double().cpu()) <= 1e-5


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_merged_gradient_is_rounded_once(mode: str, target: Target) -> None:
    """The gathered gradient and the level's other gradient are summed before the result is rounded."""
    for top_size, size in (((4, 8), (8, 16)), ((5, 3), (9, 7)), ((1, 2), (7, 9))):
        grad, own = (random_map((2, 16, *s), torch.bfloat16, target.device) for s in (size, top_size))
        with target.serves("merge_backward"):
            grad_top, _ = torch.ops.fpn_kernels.merge_backward(grad, top_size, own, mode=mode, gain=0.7)
        exact, _ = oracle.merge_backward(grad, top_size, own, mode, 0.7)
        due = 2 if target.backend == "eager" else 1.01  # eager rounds before the sum and after it
        assert oracle.error(grad_top, exact) <= due * oracle.rounding(torch.bfloat16)


def test_one_level_is_the_convolution_alone() -> None:
    features, weights, biases = _inputs()
    (merged,) = fpn_kernels.top_down_pathway(features[:1], weights[:1], biases[:1], gain=0.5)
    assert torch.equal(merged, fpn_kernels.lateral_connection(features[0], weights[0], biases[0]))


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.skipif(INTERPRETED, reason="the graph is the same with every backend, and takes most of a minute")
def test_the_default_compiler_trains_it_in_one_graph_with_symbolic_sizes(target: Target) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fpn_kernels.top_down_pathway, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        features, weights, biases = _inputs(device=target.device)
        groups = [feature.repeat(batch, 1, 1, 1) for feature in features], weights, biases
        leaves = _leaves(groups)
        with fpn_kernels.use_backend(target.backend):
            merged, expected = compiled(*groups), fpn_kernels.top_down_pathway(*groups)
            ours = torch.autograd.grad(sum((m**2).sum() for m in merged), leaves)
            theirs = torch.autograd.grad(sum((m**2).sum() for m in expected), leaves)
        for result, twin in zip((*merged, *ours), (*expected, *theirs), strict=True):
            assert oracle.error(result, twin.double().cpu()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_captured_graph_replays_on_new_values(layout: str) -> None:
    features, weights, biases = _inputs(torch.bfloat16, "cuda", layout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        fpn_kernels.top_down_pathway(features, weights, biases)  # compiles; a capture must only launch
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        merged = fpn_kernels.top_down_pathway(features, weights, biases)
    for feature in features:
        feature.copy_(torch.randn_like(feature))
    graph.replay()
    for result, expected in zip(merged, fpn_kernels.top_down_pathway(features, weights, biases), strict=True):
        assert torch.equal(result, expected)
