"""`top_down_pathway`: the numbers of chained lateral connections, on every backend that is here."""

from __future__ import annotations

import shutil
from typing import Any

import oracle
import pytest
import torch
from samples import random_map
from targets import INTERPRETED, Target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fpn_kernels
from fpn_kernels import reference

SIZES = [(30, 45), (15, 23), (8, 12), (4, 6)]
CHANNELS = [4, 8, 12, 16]
COUT = 10


def _inputs(
    dtype: torch.dtype = torch.float32, device: str = "cpu", layout: str = "nchw"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    features = [
        random_map((2, channels, *size), dtype, device, layout) for channels, size in zip(CHANNELS, SIZES, strict=True)
    ]
    weights = [random_map((COUT, channels, 1, 1), dtype, device) / channels**0.5 for channels in CHANNELS]
    return features, weights, [torch.randn(COUT, device=device).to(dtype) for _ in CHANNELS]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_equals_chained_lateral_connections(has_biases: bool, mode: str, target: Target) -> None:
    features, weights, biases = _inputs(device=target.device)
    with fpn_kernels.use_backend(target.backend):
        merged = fpn_kernels.top_down_pathway(features, weights, biases if has_biases else None, mode=mode, gain=0.5)
        top = None
        for level in (3, 2, 1, 0):
            bias = biases[level] if has_biases else None
            top = fpn_kernels.lateral_connection(features[level], weights[level], bias, top, mode=mode, gain=0.5)
            assert torch.equal(merged[level], top)
    assert isinstance(merged, tuple)


def test_matches_the_reference_in_value_and_gradient(target: Target) -> None:
    features, weights, biases = _inputs(device=target.device)
    leaves = [tensor.requires_grad_() for tensor in (*features, *weights, *biases)]
    with target.serves(target.pathway(), "lateral_connection", "merge_backward"):
        merged = fpn_kernels.top_down_pathway(features, weights, biases)
        ours = torch.autograd.grad(sum((m**2).sum() for m in merged), leaves)
    expected = reference.top_down_pathway(features, weights, biases)
    theirs = torch.autograd.grad(sum((m**2).sum() for m in expected), leaves)
    for result, twin in zip((*merged, *ours), (*expected, *theirs), strict=True):
        assert oracle.error(result, twin.double().cpu()) <= 1e-5


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_result_has_the_asked_layout(layout: str, target: Target) -> None:
    features, weights, biases = _inputs(device=target.device, layout=layout)
    with fpn_kernels.use_backend(target.backend):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for merged in fpn_kernels.top_down_pathway(features, weights, biases, memory_format=memory_format):
                assert merged.is_contiguous(memory_format=memory_format)


def _leaves(*groups: list[Tensor]) -> list[Tensor]:
    return [tensor.requires_grad_() for group in groups for tensor in group]


class _Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_merged_gradient_is_summed_where_it_is_gathered() -> None:
    """Autograd itself has nothing left to add up: each level's own gradient goes into the gather."""
    features, weights, biases = _inputs()
    leaves = _leaves(features, weights, biases)
    merged = fpn_kernels.top_down_pathway(features, weights, biases)
    grads = [torch.randn_like(level) for level in merged]
    with _Operations() as operations, fpn_kernels.use_backend("eager"):
        torch.autograd.grad(merged, leaves, grads)
    assert operations.names.count("fpn_kernels::merge_backward") == len(features) - 1
    assert not [name for name in operations.names if name.startswith("aten::add")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("used", [(0,), (1,), (3,), (0, 2), (1, 2, 3)], ids=str)
def test_a_level_that_nobody_uses_has_no_gradient_of_its_own(used: tuple[int, ...], target: Target) -> None:
    features, weights, biases = _inputs(device=target.device)
    leaves = _leaves(features, weights, biases)
    with fpn_kernels.use_backend(target.backend):
        merged = fpn_kernels.top_down_pathway(features, weights, biases, gain=0.5)
        ours = torch.autograd.grad(sum((merged[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    expected = reference.top_down_pathway(features, weights, biases, gain=0.5)
    theirs = torch.autograd.grad(sum((expected[level] ** 2).sum() for level in used), leaves, allow_unused=True)
    for result, twin in zip(ours, theirs, strict=True):
        assert (result is None) == (twin is None)
        if result is not None:
            assert oracle.error(result, twin.double().cpu()) <= 1e-5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wanted", ["features[3]", "weights[2]", "biases[0]", "biases[3]", "features[0]"])
def test_one_gradient_alone(wanted: str, target: Target) -> None:
    features, weights, biases = _inputs(device=target.device)
    groups = {"features": features, "weights": weights, "biases": biases}
    name, level = wanted.rstrip("]").split("[")
    leaf = groups[name][int(level)].requires_grad_()
    with fpn_kernels.use_backend(target.backend):
        (ours,) = torch.autograd.grad(sum((m**2).sum() for m in fpn_kernels.top_down_pathway(**groups)), leaf)
    (theirs,) = torch.autograd.grad(sum((m**2).sum() for m in reference.top_down_pathway(**groups)), leaf)
    assert oracle.error(ours, theirs.double().cpu()) <= 1e-5


@pytest.mark.parametrize("has_biases", [False, True])
def test_first_and_second_derivatives(has_biases: bool) -> None:
    sizes, channels = [(5, 7), (3, 4), (2, 2)], [3, 2, 1]
    features = [random_map((1, c, *s), torch.float64) for c, s in zip(channels, sizes, strict=True)]
    weights = [random_map((2, c, 1, 1), torch.float64) for c in channels]
    biases = [torch.randn(2, dtype=torch.float64) for _ in channels] if has_biases else []
    leaves = _leaves(features, weights, biases)

    def pathway(*flat: Tensor) -> tuple[Tensor, ...]:
        return fpn_kernels.top_down_pathway(flat[:3], flat[3:6], flat[6:] or None, mode="bilinear", gain=0.7)

    assert torch.autograd.gradcheck(pathway, leaves)
    assert torch.autograd.gradgradcheck(pathway, leaves)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_opcheck(layout: str, target: Target) -> None:
    features, weights, biases = _inputs(device=target.device, layout=layout)
    some = [biases[0], biases[2]]
    _leaves(features, weights, some)
    target.opcheck(
        torch.ops.fpn_kernels.top_down_pathway.default,
        (features, weights, some, [0, 2]),
        {"gain": 0.5},
        rtol=1e-4,
        atol=1e-5,
    )


def test_autocast_casts_every_level() -> None:
    features, weights, biases = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = fpn_kernels.top_down_pathway([features[0].bfloat16(), *features[1:]], weights, biases)
    halves = [[tensor.bfloat16() for tensor in group] for group in (features, weights, biases)]
    for ours, expected in zip(merged, fpn_kernels.top_down_pathway(*halves), strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "expanded", "misaligned"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_gradient_with_one_of_its_own(dtype: torch.dtype, mode: str, layout: str, target: Target) -> None:
    target.require(dtype)
    for top_size, size in (((4, 8), (8, 16)), ((5, 3), (9, 7)), ((1, 2), (7, 9))):
        grad = random_map((2, 16, *size), dtype, target.device)
        own = random_map((2, 16, *top_size), dtype, target.device, layout)
        with target.serves("merge_backward"):
            grad_top, grad_bias = torch.ops.fpn_kernels.merge_backward(grad, top_size, own, mode=mode, gain=0.7)
            without, same_bias = torch.ops.fpn_kernels.merge_backward(grad, top_size, None, mode=mode, gain=0.7)
        rows, columns = (oracle.resize_matrix(a, b, mode) for a, b in zip(top_size, size, strict=True))
        gathered = torch.einsum("yh,ncyx,xw->nchw", rows, grad.double().cpu(), columns)
        # Rounded once where both are added up in one pass, else before the sum and after.
        once = target.backend != "eager" and own.stride() == grad_top.stride()
        due = (1.01 if once else 2) if dtype == torch.bfloat16 else 8
        assert oracle.error(grad_top, 0.7 * gathered + own.double().cpu()) <= due * oracle.rounding(dtype)
        assert torch.equal(grad_bias, same_bias) and grad_top.stride() == without.stride()


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (torch.ones(1, 2, 3, 3), ValueError, r"own: expected the shape \[1, 2, 2, 2\], got \[1, 2, 3, 3\]"),
        (torch.ones(1, 2, 2, 2, dtype=torch.float64), TypeError, "own: expected the dtype of grad"),
        (torch.ones(2, 2), ValueError, "own: expected 4 dimensions"),
    ],
    ids=["shape", "dtype", "rank"],
)
def test_a_bad_own_gradient_is_named(own: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.fpn_kernels.merge_backward(torch.ones(1, 2, 4, 4), (2, 2), own)


@pytest.mark.parametrize("levels", [[0], [0, 4], [-1, 0]], ids=str)
def test_bad_levels_of_the_biases_are_named(levels: list[int]) -> None:
    features, weights, biases = _inputs()
    with pytest.raises(ValueError, match="bias_levels: expected"):
        torch.ops.fpn_kernels.top_down_pathway(features, weights, biases[:2], levels)


def test_one_level_is_the_convolution_alone() -> None:
    features, weights, biases = _inputs()
    (merged,) = fpn_kernels.top_down_pathway(features[:1], weights[:1], biases[:1], gain=0.5)
    assert torch.equal(merged, fpn_kernels.lateral_connection(features[0], weights[0], biases[0]))


def test_a_level_may_have_no_bias() -> None:
    features, weights, biases = _inputs()
    some = [biases[0], None, biases[2], None]
    merged = fpn_kernels.top_down_pathway(features, weights, some)
    expected = reference.top_down_pathway(features, weights, some)
    for ours, theirs in zip(merged, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


BAD = {
    "no features": (lambda f, w, b: ([], [], None), ValueError, "features: expected at least one map"),
    "a tensor": (lambda f, w, b: (f[0], w, b), TypeError, "features: expected a list or tuple of tensors, got Tensor"),
    "a mapping": (lambda f, w, b: (dict(enumerate(f)), w, b), TypeError, "features: .*got dict"),
    "weights": (lambda f, w, b: (f, w[:3], b), ValueError, "weights: expected one a level, 4, got 3"),
    "biases": (lambda f, w, b: (f, w, b[:3]), ValueError, "biases: expected one a level, 4, got 3"),
    "one feature": (
        lambda f, w, b: ([*f[:3], None], w, b),
        TypeError,
        r"features\[3\]: expected a tensor, got NoneType",
    ),
    "one weight": (lambda f, w, b: (f, [w[1], *w[1:]], b), ValueError, r"weights\[0\]: expected the shape \[Cout, 4,"),
    "one bias": (lambda f, w, b: (f, w, [*b[:3], b[3][1:]]), ValueError, r"biases\[3\]: expected the shape \[10\]"),
    "a number for a feature": (
        lambda f, w, b: ([f[0].sum(), *f[1:]], w, b),
        ValueError,
        r"features\[0\]: expected 4 dimensions",
    ),
    "a number for a weight": (
        lambda f, w, b: (f, [w[0].sum(), *w[1:]], b),
        ValueError,
        r"weights\[0\]: expected the shape \[Cout, 4,",
    ),
    "one dtype": (lambda f, w, b: ([f[0], f[1].half(), *f[2:]], w, b), TypeError, r"weights\[1\]: expected the dtype"),
    "one batch": (
        lambda f, w, b: ([*f[:3], f[3][:1]], w, b),
        ValueError,
        r"features\[3\]: expected the batch of .*2, g",
    ),
    "one width": (lambda f, w, b: (f, [*w[:3], w[3][:5]], None), ValueError, r"weights\[3\]: expected the output chan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_computed(case: str) -> None:
    make, error, message = BAD[case]
    with fpn_kernels.backends.selection.record_calls() as calls, pytest.raises(error, match=message):
        fpn_kernels.top_down_pathway(*make(*_inputs()))
    assert calls == []


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        fpn_kernels.top_down_pathway(*_inputs(), mode="cubic")
    with pytest.raises(TypeError, match="memory_format: expected a torch.memory_format"):
        fpn_kernels.top_down_pathway(*_inputs(), memory_format="nchw")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_the_default_compiler_trains_it_in_one_graph_with_symbolic_sizes(target: Target) -> None:
    if INTERPRETED:
        pytest.skip("whichever backend computes it, the graph is the same, and takes most of a minute")
    torch._dynamo.reset()
    compiled = torch.compile(fpn_kernels.top_down_pathway, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        features, weights, biases = _inputs(device=target.device)
        features = [feature.repeat(batch, 1, 1, 1) for feature in features]
        leaves = [tensor.requires_grad_() for tensor in (*features, *weights, *biases)]
        with target.serves(target.pathway(), "lateral_connection", "merge_backward"):
            merged = compiled(features, weights, biases)
            ours = torch.autograd.grad(sum((m**2).sum() for m in merged), leaves)
            expected = fpn_kernels.top_down_pathway(features, weights, biases)
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
