"""`lateral_connection` and its gradients, on every backend that is here."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import oracle
import pytest
import torch
from samples import random_map
from targets import Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference, resampling

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = list(resampling.MODES)


class Case(NamedTuple):
    batch: int
    cin: int
    cout: int
    top: tuple[int, int]
    fine: tuple[int, int]


CASES = [
    Case(1, 64, 32, (4, 6), (8, 12)),  # whole ratio, whole tiles of channels
    Case(2, 5, 10, (5, 7), (10, 13)),  # tails in every dimension
    Case(1, 257, 3, (3, 3), (5, 6)),  # a tail of one input channel
    Case(1, 1, 257, (1, 1), (4, 5)),  # one input channel, a 1 x 1 top, a tail of one output channel
    Case(1, 10, 1, (19, 29), (38, 57)),  # C5 to C4 of a 600 x 900 image, one output channel
    Case(1, 256, 256, (4, 5), (8, 10)),  # the paper's width
    Case(2, 12, 20, (15, 9), (29, 17)),  # uneven float32 indices
    Case(1, 8, 16, (6, 6), (4, 3)),  # a top larger than the feature
]


def _id(case: Case) -> str:
    return f"{case.batch}x{case.cin}-to-{case.cout}-{case.fine[0]}x{case.fine[1]}"


def _inputs(
    case: Case, dtype: torch.dtype, device: str, layout: str = "nchw", top_layout: str = "nchw"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    feature = random_map((case.batch, case.cin, *case.fine), dtype, device, layout)
    top = random_map((case.batch, case.cout, *case.top), dtype, device, top_layout)
    weight = random_map((case.cout, case.cin, 1, 1), dtype, device) / case.cin**0.5
    bias = random_map((1, case.cout, 1, 1), dtype, device).flatten()
    return feature, weight, bias, top


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gain", [1.0, 0.7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_values(case: Case, dtype: torch.dtype, mode: str, gain: float, target: Target) -> None:
    target.require(dtype)
    feature, weight, bias, top = _inputs(case, dtype, target.device)
    with fpn_kernels.use_backend(target.backend), fpn_kernels.backends.selection.record_calls() as calls:
        result = fpn_kernels.lateral_connection(feature, weight, bias, top, mode=mode, gain=gain)
    assert calls[0] == ("lateral_connection", target.backend)
    eager = reference.lateral_connection(feature, weight, bias, top, mode=mode, gain=gain)
    exact = oracle.lateral_connection(feature, weight, bias, top, mode, gain)
    if _eager_reads_other_pixels(case, mode, dtype):
        assert oracle.error(result, exact) <= 4 * oracle.rounding(dtype)
    else:
        assert oracle.no_worse_than_eager(result, eager, exact)
    assert result.dtype == dtype and result.shape == eager.shape


def _eager_reads_other_pixels(case: Case, mode: str, dtype: torch.dtype) -> bool:
    axes = zip(case.top, case.fine, strict=True)
    return mode != "bilinear" and not all(resampling.indices_agree(i, o, mode, dtype) for i, o in axes)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("has_top", [False, True], ids=["no top", "top"])
@pytest.mark.parametrize("matrix", [False, True], ids=["4-D weight", "2-D weight"])
def test_optional_arguments(has_bias: bool, has_top: bool, matrix: bool, target: Target) -> None:
    feature, weight, bias, top = _inputs(CASES[1], torch.float32, target.device)
    options = (bias if has_bias else None, top if has_top else None)
    weight = weight.flatten(1) if matrix else weight
    with target.serves("lateral_connection"):
        result = fpn_kernels.lateral_connection(feature, weight, *options, gain=0.5)
    # Without a top there is nothing to average: no gain.
    exact = oracle.lateral_connection(feature, weight, *options, gain=0.5)
    eager = reference.lateral_connection(feature, weight, *options, gain=0.5)
    assert oracle.no_worse_than_eager(result, eager, exact)


FORMATS = {"preserve": torch.preserve_format, "nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize(
    "layouts",
    list(itertools.product(["nchw", "nhwc", "sliced", "sliced-nhwc", "permuted", "expanded", "misaligned"], repeat=2)),
    ids="-".join,
)
def test_any_strides_in_and_the_asked_layout_out(layouts: tuple[str, str], asked: str, target: Target) -> None:
    case = Case(2, 6, 5, (3, 4), (7, 8))
    feature, weight, bias, top = _inputs(case, torch.float32, target.device, *layouts)
    before = [tensor.clone() for tensor in (feature, weight, bias, top)]
    with target.serves("lateral_connection"):
        result = fpn_kernels.lateral_connection(feature, weight, bias, top, memory_format=FORMATS[asked])
    is_nhwc = asked == "nhwc" or (asked == "preserve" and layouts[0] in ("nhwc", "sliced-nhwc"))
    assert result.is_contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)
    eager = reference.lateral_connection(feature, weight, bias, top)
    assert oracle.no_worse_than_eager(result, eager, oracle.lateral_connection(feature, weight, bias, top))
    for tensor, was in zip((feature, weight, bias, top), before, strict=True):
        assert torch.equal(tensor, was)


@pytest.mark.parametrize("weight_layout", ["transposed", "sliced"])
def test_strided_weights(weight_layout: str, target: Target) -> None:
    feature, weight, bias, top = _inputs(CASES[1], torch.float32, target.device)
    wide = torch.zeros(10, 10, 1, 1, device=target.device)
    wide[:, ::2] = weight
    strided = wide[:, ::2] if weight_layout == "sliced" else weight.flatten(1).t().contiguous().t()
    assert torch.equal(strided.flatten(1), weight.flatten(1)) and not strided.is_contiguous()
    with target.serves("lateral_connection"):
        result = fpn_kernels.lateral_connection(feature, strided, bias[:], top)
    eager = reference.lateral_connection(feature, weight, bias, top)
    assert oracle.no_worse_than_eager(result, eager, oracle.lateral_connection(feature, weight, bias, top))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_gradients(case: Case, dtype: torch.dtype, mode: str, layout: str, target: Target) -> None:
    target.require(dtype)
    inputs = [tensor.requires_grad_() for tensor in _inputs(case, dtype, target.device, layout, layout)]
    exact_inputs = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    grad = random_map((case.batch, case.cout, *case.fine), dtype, target.device, layout)
    result = fpn_kernels.lateral_connection(*inputs, mode=mode, gain=0.5)
    with target.serves("merge_backward", "lateral_connection"):
        gradients = torch.autograd.grad(result, inputs, grad)
    eager = torch.autograd.grad(reference.lateral_connection(*inputs, mode=mode, gain=0.5), inputs, grad)
    exact = torch.autograd.grad(oracle.lateral_connection(*exact_inputs, mode, 0.5), exact_inputs, grad.double().cpu())
    for name, ours, theirs, true in zip(("feature", "weight", "bias", "top"), gradients, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        if name == "top" and _eager_reads_other_pixels(case, mode, dtype):
            assert oracle.error(ours, true) <= 4 * oracle.rounding(dtype)
        else:
            assert oracle.no_worse_than_eager(ours, theirs, true)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_asked_for_are_computed(wanted: tuple[bool, ...], target: Target) -> None:
    inputs = _inputs(CASES[1], torch.float32, target.device)
    for tensor, wants in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(wants)
    result = fpn_kernels.lateral_connection(*inputs)
    assert result.requires_grad == any(wanted)
    if not any(wanted):
        return
    with fpn_kernels.use_backend(target.backend), fpn_kernels.backends.selection.record_calls() as calls:
        result.sum().backward()
    wants_feature, _, wants_bias, wants_top = wanted
    expected = [("merge_backward" if wants_bias else "upsample_add_backward", target.backend)] * wants_top
    assert calls == expected + [("lateral_connection", target.backend)] * wants_feature
    eager = [tensor.detach().requires_grad_() for tensor in inputs]
    reference.lateral_connection(*eager).sum().backward()
    for tensor, twin, wants in zip(inputs, eager, wanted, strict=True):
        assert (tensor.grad is not None) == wants
        if wants:
            torch.testing.assert_close(tensor.grad, twin.grad, rtol=1e-5, atol=1e-5)


def test_what_the_backward_does_not_need_is_not_kept(target: Target) -> None:
    """Training memory: a frozen weight keeps no feature alive, and the top is never kept."""
    feature, weight, bias, top = _inputs(CASES[0], torch.float32, target.device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fpn_kernels.lateral_connection(feature.requires_grad_(), weight, bias, top.requires_grad_())
    assert [tensor.shape for tensor in saved] == [weight.shape]


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, target: Target) -> None:
    target.require(torch.float64)
    case = Case(2, 3, 2, (2, 3), (5, 4))
    inputs = [tensor.requires_grad_() for tensor in _inputs(case, torch.float64, target.device)]

    def connect(*tensors: Tensor) -> Tensor:
        return fpn_kernels.lateral_connection(*tensors, mode=mode, gain=0.7, memory_format=torch.channels_last)

    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(connect, inputs)
        assert torch.autograd.gradgradcheck(connect, inputs)


def test_double_backward_in_float32(target: Target) -> None:
    """A gradient penalty, as trained with, against the oracle's."""
    inputs = [tensor.requires_grad_() for tensor in _inputs(CASES[1], torch.float32, target.device)]
    exact_inputs = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]

    def penalty(result: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad((result**2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves)

    with fpn_kernels.use_backend(target.backend):
        ours = penalty(fpn_kernels.lateral_connection(*inputs), inputs)
    for result, exact in zip(ours, penalty(oracle.lateral_connection(*exact_inputs), exact_inputs), strict=True):
        assert oracle.error(result, exact) <= 1e-5


@pytest.mark.sampled(4)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced-nhwc"])
@pytest.mark.parametrize("has_top", [False, True], ids=["no top", "top"])
def test_opcheck(layout: str, requires_grad: bool, has_top: bool, target: Target) -> None:
    feature, weight, bias, top = (
        tensor.requires_grad_(requires_grad)
        for tensor in _inputs(CASES[1], torch.float32, target.device, layout, layout)
    )
    operators = torch.ops.fpn_kernels
    for memory_format in FORMATS.values():
        options = {"gain": 0.5, "memory_format": memory_format}
        target.opcheck(
            operators.lateral_connection.default,
            (feature, weight, bias, top if has_top else None),
            options,
            # The weight's gradient is a product over all pixels: dynamic shapes reorder its sum.
            rtol=1e-4,
            atol=1e-5,
        )
    target.opcheck(operators.merge_backward.default, (top, (2, 3), None), {"gain": 0.5}, rtol=1e-4, atol=1e-5)


def test_empty_batch(target: Target) -> None:
    inputs = [t.requires_grad_() for t in _inputs(Case(0, 5, 3, (2, 2), (4, 4)), torch.float32, target.device)]
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.lateral_connection(*inputs)
        result.sum().backward()
    assert result.shape == (0, 3, 4, 4)
    for tensor in inputs:
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_autocast_runs_in_the_autocast_dtype(target: Target) -> None:
    inputs = [tensor.requires_grad_() for tensor in _inputs(CASES[0], torch.float32, target.device)]
    with torch.autocast(target.device, dtype=torch.bfloat16), target.serves("lateral_connection"):
        result = fpn_kernels.lateral_connection(*inputs)
    halves = [tensor.detach().bfloat16() for tensor in inputs]
    assert oracle.no_worse_than_eager(result, reference.lateral_connection(*halves), oracle.lateral_connection(*halves))
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs)


BAD = {
    "feature is an array": (lambda f, w, b, t: (f.tolist(), w), {}, TypeError, "feature: expected a tensor, got list"),
    "weight is None": (lambda f, w, b, t: (f, None), {}, TypeError, "weight: expected a tensor, got NoneType"),
    "bias is a number": (lambda f, w, b, t: (f, w, 1.0), {}, TypeError, "bias: expected a tensor or None, got float"),
    "top is a number": (lambda f, w, b, t: (f, w, b, 2), {}, TypeError, "top: expected a tensor or None, got int"),
    "rank of feature": (lambda f, w, b, t: (f[0], w, b, t), {}, ValueError, "feature: expected 4 dimensions"),
    "no input channels": (lambda f, w, b, t: (f[:, :0], w, b, t), {}, ValueError, "feature: expected at least one cha"),
    "input channels": (lambda f, w, b, t: (f[:, :2], w, b, t), {}, ValueError, r"weight: .*\[Cout, 2\], got \[4, 3, 1"),
    "a 3x3 weight": (lambda f, w, b, t: (f, w.expand(4, 3, 3, 3), b, t), {}, ValueError, r"weight: .*\[4, 3, 3, 3\]"),
    "rank of weight": (
        lambda f, w, b, t: (f, w[..., 0], b, t),
        {},
        ValueError,
        r"weight: expected the shape \[Cout, 3",
    ),
    "size of bias": (lambda f, w, b, t: (f, w, b[:3], t), {}, ValueError, r"bias: expected the shape \[4\], got \[3\]"),
    "rank of bias": (lambda f, w, b, t: (f, w, b[None], t), {}, ValueError, r"bias: .*got \[1, 4\]"),
    "channels of top": (lambda f, w, b, t: (f, w, b, t[:, :3]), {}, ValueError, r"top: .*\[2, 4, h, w\], got \[2, 3, "),
    "batch of top": (lambda f, w, b, t: (f, w, b, t[:1]), {}, ValueError, r"top: .*got \[1, 4, 2, 3\]"),
    "dtype of weight": (
        lambda f, w, b, t: (f, w.double(), b, t),
        {},
        TypeError,
        "weight: expected the dtype of feature",
    ),
    "dtype of bias": (lambda f, w, b, t: (f, w, b.half(), t), {}, TypeError, "bias: expected the dtype of feature"),
    "dtype of top": (lambda f, w, b, t: (f, w, b, t.double()), {}, TypeError, "top: expected the dtype of feature"),
    "integer feature": (lambda f, w, b, t: (f.int(), w, b, t), {}, TypeError, "feature: .*got torch.int32"),
    "device": (lambda f, w, b, t: (f, w.to("meta"), b, t), {}, ValueError, "weight: expected the device of feature"),
    "mode": (lambda f, w, b, t: (f, w, b, t), {"mode": "area"}, ValueError, "mode: expected one of .*'area'"),
    "gain": (lambda f, w, b, t: (f, w, b, t), {"gain": None}, TypeError, "gain: expected a number, got NoneType"),
    "format": (
        lambda f, w, b, t: (f, w, b, t),
        {"memory_format": torch.channels_last_3d},
        ValueError,
        "memory_format: .*got torch.channels_last_3d",
    ),
    "type of format": (
        lambda f, w, b, t: (f, w, b, t),
        {"memory_format": "NHWC"},
        TypeError,
        "memory_format: expected a torch.memory_format, got str",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, target: Target) -> None:
    make, keywords, error, message = BAD[case]
    inputs = _inputs(Case(2, 3, 4, (2, 3), (4, 6)), torch.float32, target.device)
    before = [tensor.clone() for tensor in inputs]
    with fpn_kernels.use_backend(target.backend), pytest.raises(error, match=message):
        fpn_kernels.lateral_connection(*make(*inputs), **keywords)
    for tensor, was in zip(inputs, before, strict=True):
        assert torch.equal(tensor, was)


def test_compile_with_symbolic_sizes(target: Target) -> None:
    torch._dynamo.reset()  # the limit of recompilations counts over all tests of this function
    compiled = torch.compile(
        lambda *tensors: fpn_kernels.lateral_connection(*tensors, gain=0.5).relu(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for case in (CASES[0], CASES[1], CASES[6]):
        inputs = [tensor.requires_grad_() for tensor in _inputs(case, torch.float32, target.device)]
        with target.serves("lateral_connection", "merge_backward"):
            result = compiled(*inputs)
            gradients = torch.autograd.grad(result.sum(), inputs)
            expected = fpn_kernels.lateral_connection(*inputs, gain=0.5).relu()
            for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
                torch.testing.assert_close(ours, theirs)
        assert torch.equal(result, expected)


def test_export_keeps_the_operator() -> None:
    class Connection(torch.nn.Module):
        def forward(self, feature: Tensor, weight: Tensor, bias: Tensor, top: Tensor) -> Tensor:
            return fpn_kernels.lateral_connection(feature, weight, bias, top)

    inputs = _inputs(CASES[1], torch.float32, "cpu")
    program = torch.export.export(Connection(), inputs)
    assert any("lateral_connection" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), fpn_kernels.lateral_connection(*inputs))
