"""`output_conv_levels`: the output convolutions of a pyramid as one operator, on every backend that is here."""

from __future__ import annotations

import gc
import itertools
import weakref

import oracle
import pytest
import torch
import torch.nn.functional as F
from samples import random_map
from targets import Target
from torch import Tensor
from twins import maps, pair

import fpn_kernels
from fpn_kernels import functional
from fpn_kernels.backends import selection
from fpn_kernels.modules import pathway
from fpn_kernels.modules.fusing import fused_parameters

SIZES = [(13, 18), (7, 9), (4, 5), (1, 2)]
CIN, COUT = 16, 24
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

Levels = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _inputs(dtype: torch.dtype = torch.float32, device: str = "cpu", layout: str = "nhwc", batch: int = 2) -> Levels:
    features = [random_map((batch, CIN, *size), dtype, device, layout) for size in SIZES]
    weights = [random_map((COUT, CIN, 3, 3), dtype, device) / (3 * CIN**0.5) for _ in SIZES]
    return features, weights, [torch.randn(COUT, device=device).to(dtype) for _ in SIZES]


def _eager(features: list[Tensor], weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [F.conv2d(*level, padding=1) for level in zip(features, weights, biases, strict=True)]


def _served(target: Target, layout: str) -> str:
    """Triton's one launch reads NHWC maps; elsewhere each level is served by itself."""
    whole = target.has_whole("output_conv_levels") and layout == "nhwc"
    return "output_conv_levels" if whole else "output_conv"


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_error_against_float64(dtype: torch.dtype, has_bias: bool, layout: str, asked: str, target: Target) -> None:
    target.require(dtype)
    features, weights, biases = _inputs(dtype, target.device, layout)
    given = biases if has_bias else [None] * len(SIZES)
    served = _served(target, layout)
    with fpn_kernels.use_backend(target.backend), selection.record_calls() as calls, torch.no_grad():
        results = functional.output_conv_levels(
            features, weights, biases if has_bias else None, memory_format=FORMATS[asked]
        )
    assert [name for name, _ in calls] == [served] * (1 if served == "output_conv_levels" else len(SIZES))
    assert isinstance(results, tuple)
    for result, eager, *level in zip(results, _eager(features, weights, given), features, weights, given, strict=True):
        assert result.dtype == dtype and result.is_contiguous(memory_format=FORMATS[asked])
        assert oracle.no_worse_than_eager(result, eager, oracle.output_conv(*level))


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
        assert torch.equal(result, fpn_kernels.output_conv(*level))
        assert result.stride() == fpn_kernels.output_conv(*level).stride()


def test_the_neck_hands_over_all_levels_in_one_call(target: Target) -> None:
    network, twin = (module.to(target.device) for module in pair())
    layout = torch.channels_last if _served(target, "nhwc") == "output_conv_levels" else torch.contiguous_format
    x = {name: m.to(target.device).contiguous(memory_format=layout) for name, m in maps(1).items()}
    with fpn_kernels.use_backend(target.backend), selection.record_calls() as calls, torch.no_grad():
        outputs = network(x)
    served = [name for name, _ in calls if name.startswith("output_conv")]
    whole = layout == torch.channels_last
    assert served == (["output_conv_levels"] if whole else ["output_conv"] * 4)
    for ours, theirs in zip(outputs.values(), twin(x).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------- gradients


def _operator(features: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    levels = list(range(len(biases)))
    results: list[Tensor] = torch.ops.fpn_kernels.output_conv_levels(features, weights, biases, levels)
    return results


@pytest.mark.sampled(2)
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1,), (0, 3)], ids=str)
@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
def test_gradients_of_the_operator(wanted: tuple[bool, ...], used: tuple[int, ...], target: Target) -> None:
    groups = _inputs(device=target.device)
    leaves = [t.requires_grad_() for group, wants in zip(groups, wanted, strict=True) if wants for t in group]
    with fpn_kernels.use_backend(target.backend):
        results = _operator(*groups)
        ours = torch.autograd.grad(sum((results[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    eager = _eager(*groups)
    theirs = torch.autograd.grad(sum((eager[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    for result, twin in zip(ours, theirs, strict=True):
        assert (result is None) == (twin is None)
        if result is not None:
            assert oracle.error(result, twin.double().cpu()) <= 1e-5


def test_first_and_second_derivatives() -> None:
    features = [random_map((1, 2, *size), torch.float64).requires_grad_() for size in ((3, 2), (1, 2))]
    weights = [random_map((2, 2, 3, 3), torch.float64).requires_grad_() for _ in features]
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def convolve(*flat: Tensor) -> list[Tensor]:
        results: list[Tensor] = torch.ops.fpn_kernels.output_conv_levels(flat[:2], flat[2:4], flat[4:], [1])
        return results

    assert torch.autograd.gradcheck(convolve, (*features, *weights, bias))
    assert torch.autograd.gradgradcheck(convolve, (*features, *weights, bias))


def test_training_keeps_no_level_longer_than_its_own_backward() -> None:
    """Where autograd records the neck, its output convolutions are a node a level: each lets its merged map go."""
    network, _ = pair()
    merged = list(pathway.pyramid(list(maps().values()), network.inner_blocks, [])[0])
    blocks = [fused_parameters(block, 3) for block in network.layer_blocks]
    results = pathway._output_maps(merged, merged, blocks)
    assert len({result.grad_fn for result in results if result is not None}) == 4
    saved = [weakref.ref(level) for level in merged]
    del merged
    gc.collect()
    assert all(reference() is not None for reference in saved)
    for level in (2, 0):
        result = results[level]
        assert result is not None
        torch.autograd.grad(result.sum(), list(network.layer_blocks[level].parameters()))
        del result
    gc.collect()
    assert [saved[level]() is None for level in range(4)] == [True, False, True, False]


def test_recorded_levels_are_a_node_each_whoever_looks_on() -> None:
    """A profile of a training step shows the memory that the step takes without it."""
    groups = [[tensor.requires_grad_() for tensor in group] for group in _inputs()]
    alone = functional.output_conv_levels(*groups)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        observed = functional.output_conv_levels(*groups)
    for results in (alone, observed):
        assert len({result.grad_fn for result in results}) == len(SIZES)
    for ours, theirs in zip(alone, observed, strict=True):
        assert torch.equal(ours, theirs)


def test_a_level_that_needs_no_gradient_has_no_node() -> None:
    features, weights, biases = _inputs()
    weights[1].requires_grad_()
    results = functional.output_conv_levels(features, weights, [None, *biases[1:]])
    assert [result.requires_grad for result in results] == [False, True, False, False]
    for result, *level in zip(results, features, weights, [None, *biases[1:]], strict=True):
        assert torch.equal(result, fpn_kernels.output_conv(*level))


# ----------------------------------------------------------------------------------------- PyTorch citizenship


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_opcheck(layout: str, requires_grad: bool, target: Target) -> None:
    groups = [group[2:] for group in _inputs(device=target.device, layout=layout)]
    features, weights, biases = ([t.requires_grad_(requires_grad) for t in group] for group in groups)
    for bias_levels in ([], [1]):
        target.opcheck(
            torch.ops.fpn_kernels.output_conv_levels.default,
            (features, weights, [biases[level] for level in bias_levels], bias_levels),
            {"memory_format": torch.channels_last},
            rtol=1e-4,
            atol=1e-5,
        )


def test_compiles_with_gradients_as_one_operator() -> None:
    features, weights, biases = _inputs()
    leaves = [t.requires_grad_() for group in (features, weights, biases) for t in group]
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(functional.output_conv_levels, fullgraph=True, backend=backend)
    results = compiled(features, weights, biases)
    assert sum("output_conv_levels" in name for name in seen) == 1
    ours = torch.autograd.grad(sum(r.sum() for r in results), leaves)
    theirs = torch.autograd.grad(sum(r.sum() for r in _eager(features, weights, biases)), leaves)
    for result, twin in zip(ours, theirs, strict=True):
        assert oracle.error(result, twin.double()) <= 1e-5


def test_autocast_casts_every_level() -> None:
    features, weights, biases = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        results = functional.output_conv_levels([features[0].bfloat16(), *features[1:]], weights, biases)
    halves = [[tensor.bfloat16() for tensor in group] for group in (features, weights, biases)]
    for ours, expected in zip(results, functional.output_conv_levels(*halves), strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)


def test_an_empty_batch(target: Target) -> None:
    groups = _inputs(device=target.device, batch=0)
    leaves = [tensor.requires_grad_() for group in groups for tensor in group]
    with fpn_kernels.use_backend(target.backend):
        results = _operator(*groups)
        assert [tuple(r.shape) for r in results] == [(0, COUT, *size) for size in SIZES]
        gradients = torch.autograd.grad(sum(r.sum() for r in results), leaves)
    assert all(not g.any() for g in gradients)


def test_explain_says_whose_launch_it_is(target: Target) -> None:
    features, weights, biases = _inputs(device=target.device)
    with fpn_kernels.use_backend(target.backend):
        explanation = fpn_kernels.explain("output_conv_levels", features, weights, biases)
    whole = target.has_whole("output_conv_levels")
    assert explanation.backend == (target.backend if whole else "composition: one output_conv a level")


BAD = {
    "no features": (lambda f, w, b: ([], [], None), ValueError, "features: expected at least one map"),
    "a tensor": (lambda f, w, b: (f[0], w, b), TypeError, "features: expected a list or tuple of tensors, got Tensor"),
    "weights": (lambda f, w, b: (f, w[:3], b), ValueError, "weights: expected one a level, 4, got 3"),
    "biases": (lambda f, w, b: (f, w, b[:3]), ValueError, "biases: expected one a level, 4, got 3"),
    "one weight": (
        lambda f, w, b: (f, [w[0][:, :, :1, :1], *w[1:]], b),
        ValueError,
        r"weights\[0\]: expected the shape \[Cout, 16, 3, 3\]",
    ),
    "one bias": (lambda f, w, b: (f, w, [*b[:3], b[3][1:]]), ValueError, r"biases\[3\]: expected the shape \[24\]"),
    "one dtype": (lambda f, w, b: ([f[0], f[1].half(), *f[2:]], w, b), TypeError, r"weights\[1\]: expected the dtype"),
    "a level's dtype": (
        lambda f, w, b: ([f[0], f[1].half(), *f[2:]], [w[0], w[1].half(), *w[2:]], None),
        TypeError,
        r"features\[1\]: expected the dtype of features\[0\]",
    ),
    "one rank": (lambda f, w, b: ([*f[:3], f[3][0]], w, b), ValueError, r"features\[3\]: expected 4 dimensions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_computed(case: str) -> None:
    make, error, message = BAD[case]
    for recorded in (False, True):
        groups = [[tensor.requires_grad_(recorded) for tensor in group] for group in _inputs()]
        with selection.record_calls() as calls, pytest.raises(error, match=message):
            functional.output_conv_levels(*make(*groups))
        assert calls == []


@pytest.mark.parametrize("levels", [[0], [0, 4], [-1, 0]], ids=str)
def test_bad_levels_of_the_biases_are_named(levels: list[int]) -> None:
    features, weights, biases = _inputs()
    with pytest.raises(ValueError, match="bias_levels: expected"):
        torch.ops.fpn_kernels.output_conv_levels(features, weights, biases[:2], levels)
