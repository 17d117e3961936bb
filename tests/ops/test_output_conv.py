"""`output_conv` and its gradients, on every backend that is here."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from samples import LAYOUTS, random_map
from targets import Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.backends import convolution, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"preserve": torch.preserve_format, "nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class Case(NamedTuple):
    batch: int
    cin: int
    cout: int
    size: tuple[int, int]


CASES = [
    Case(1, 32, 64, (8, 12)),  # whole vectors of channels and pixels
    Case(2, 5, 10, (10, 13)),  # tails in every dimension
    Case(1, 1, 3, (1, 1)),  # one channel, one pixel: all but the middle tap is padding
    Case(1, 33, 1, (1, 40)),  # one row, one output channel
    Case(3, 2, 17, (50, 1)),  # one column
    Case(1, 256, 256, (5, 7)),  # the paper's width
    Case(2, 16, 16, (38, 57)),  # large enough for the layout and the gradients of large maps
]


def _id(case: Case) -> str:
    return f"{case.batch}x{case.cin}-to-{case.cout}-{case.size[0]}x{case.size[1]}"


def random_inputs(case: Case, dtype: torch.dtype, device: str, layout: str = "nchw") -> tuple[Tensor, Tensor, Tensor]:
    feature = random_map((case.batch, case.cin, *case.size), dtype, device, layout)
    weight = random_map((case.cout, case.cin, 3, 3), dtype, device) / (3 * case.cin**0.5)
    bias = random_map((1, case.cout, 1, 1), dtype, device).flatten()
    return feature, weight, bias


@pytest.fixture(autouse=True)
def _has_the_operator(request: pytest.FixtureRequest) -> None:
    if "target" in request.fixturenames:
        request.getfixturevalue("target").require_operator("output_conv")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_error_against_float64(
    case: Case, dtype: torch.dtype, has_bias: bool, asked: str, layout: str, target: Target
) -> None:
    target.require(dtype)
    feature, weight, bias = random_inputs(case, dtype, target.device, layout)
    arguments = (feature, weight, bias if has_bias else None)
    with target.serves("output_conv"):
        result = fpn_kernels.output_conv(*arguments, memory_format=FORMATS[asked])
    assert result.dtype == dtype and result.shape == (case.batch, case.cout, *case.size)
    assert oracle.no_worse_than_eager(result, reference.output_conv(*arguments), oracle.output_conv(*arguments))


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_and_the_asked_layout_out(layout: str, dtype: torch.dtype, asked: str, target: Target) -> None:
    for case in (Case(2, 6, 5, (7, 8)), Case(1, 6, 5, (48, 50))):  # the second is a large map
        inputs = random_inputs(case, dtype, target.device, layout)
        before = [tensor.clone() for tensor in inputs]
        with target.serves("output_conv"):
            result = fpn_kernels.output_conv(*inputs, memory_format=FORMATS[asked])
        is_nhwc = asked == "nhwc" or (asked == "preserve" and layout in ("nhwc", "sliced-nhwc"))
        assert result.is_contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)
        assert oracle.no_worse_than_eager(result, reference.output_conv(*inputs), oracle.output_conv(*inputs))
        for tensor, was in zip(inputs, before, strict=True):
            assert torch.equal(tensor, was)


@pytest.mark.parametrize("weight_layout", ["nhwc", "sliced", "turned"])
def test_strided_weights(weight_layout: str, target: Target) -> None:
    feature, _, bias = random_inputs(CASES[1], torch.float32, target.device)
    if weight_layout == "turned":  # as the backward has it
        strided = random_map((5, 10, 3, 3), torch.float32, target.device).flip(2, 3).transpose(0, 1)
    else:
        strided = random_map((10, 5, 3, 3), torch.float32, target.device, weight_layout)
    assert not strided.is_contiguous()
    with target.serves("output_conv"):
        result = fpn_kernels.output_conv(feature, strided, bias)
    assert result.is_contiguous(), "the weight's layout is not the result's"
    eager = reference.output_conv(feature, strided.contiguous(), bias)
    assert oracle.no_worse_than_eager(result, eager, oracle.output_conv(feature, strided, bias))


# --------------------------------------------------------------------------------------------------- gradients


def _expected_calls(grad: Tensor, feature: Tensor, wanted: tuple[bool, ...]) -> list[str]:
    """What the backward asks of the backends, on the CPU; elsewhere ATen's own backward does it all."""
    wants_feature, wants_weight, _ = wanted
    calls = []
    on_cpu = grad.device.type == "cpu"
    nhwc = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (grad, feature)]
    if wants_weight and on_cpu and nhwc[0] != nhwc[1]:
        calls.append("reorder")
    # Among the cases there is no bfloat16 map so large that the adjoint pays where oneDNN multiplies it.
    by_onednn = convolution.onednn_multiplies(grad.dtype) and not native.multiplies_by_tiles(grad.dtype)
    pays = grad.dtype != torch.bfloat16 or not by_onednn
    large = grad.shape[0] * grad.shape[2] * grad.shape[3] >= (256 if convolution.by_avx2("cpu", grad.dtype) else 2048)
    by_adjoint = wants_feature and (not wants_weight or (on_cpu and large and pays))
    if by_adjoint:
        calls.append("output_conv")
    if wants_weight and (by_adjoint or not wants_feature):
        calls.append("output_conv_backward_weight")
    return calls


@pytest.mark.parametrize("layouts", list(itertools.product(["nchw", "nhwc"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], CASES[6]], ids=_id)
def test_gradients(case: Case, dtype: torch.dtype, layouts: tuple[str, str], target: Target) -> None:
    target.require(dtype)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(case, dtype, target.device, layouts[0])]
    exact_inputs = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    grad = random_map((case.batch, case.cout, *case.size), dtype, target.device, layouts[1])
    result = fpn_kernels.output_conv(*inputs)
    with target.serves(*_expected_calls(grad, inputs[0], (True, True, True))):
        gradients = torch.autograd.grad(result, inputs, grad)
    eager = torch.autograd.grad(reference.output_conv(*inputs), inputs, grad)
    exact = torch.autograd.grad(oracle.output_conv(*exact_inputs), exact_inputs, grad.double().cpu())
    for ours, theirs, true in zip(gradients, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        assert oracle.no_worse_than_eager(ours, theirs, true)


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=_id)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_asked_for_are_computed(wanted: tuple[bool, ...], case: Case, target: Target) -> None:
    inputs = random_inputs(case, torch.float32, target.device, "nhwc")
    for tensor, wants in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(wants)
    result = fpn_kernels.output_conv(*inputs)
    assert result.requires_grad == any(wanted)
    if not any(wanted):
        return
    grad = random_map(tuple(result.shape), torch.float32, target.device)
    with target.serves(*_expected_calls(grad, inputs[0], wanted)):
        result.backward(grad)
    eager = [tensor.detach().requires_grad_() for tensor in inputs]
    reference.output_conv(*eager).backward(grad)
    for tensor, twin, wants in zip(inputs, eager, wanted, strict=True):
        assert (tensor.grad is not None) == wants
        if wants:
            torch.testing.assert_close(tensor.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_what_the_backward_does_not_need_is_not_kept(target: Target) -> None:
    """Training memory: a frozen weight keeps no feature alive."""
    feature, weight, bias = random_inputs(CASES[0], torch.float32, target.device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fpn_kernels.output_conv(feature.requires_grad_(), weight, bias)
    assert [tensor.shape for tensor in saved] == [weight.shape]


@pytest.fixture(params=[False, True], ids=["few pixels", "many pixels"])
def every_map_is_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both routes of the backward, at sizes that a numerical gradient can afford."""
    monkeypatch.setattr(convolution, "_FEW_PIXELS", 0 if request.param else 2**60)


@pytest.mark.usefixtures("every_map_is_large")
@pytest.mark.parametrize("asked", ["nchw", "nhwc"])
def test_gradcheck(asked: str, target: Target) -> None:
    target.require(torch.float64)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(Case(2, 3, 2, (4, 3)), torch.float64, target.device)]

    def convolve(*tensors: Tensor) -> Tensor:
        return fpn_kernels.output_conv(*tensors, memory_format=FORMATS[asked])

    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(convolve, inputs)
        assert torch.autograd.gradgradcheck(convolve, inputs)


@pytest.mark.usefixtures("every_map_is_large")
def test_double_backward_in_float32(target: Target) -> None:
    """A gradient penalty, as trained with, against the oracle's."""
    inputs = [tensor.requires_grad_() for tensor in random_inputs(CASES[1], torch.float32, target.device)]
    exact_inputs = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]

    def penalty(result: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad((result**2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves)

    with fpn_kernels.use_backend(target.backend):
        ours = penalty(fpn_kernels.output_conv(*inputs), inputs)
    for result, exact in zip(ours, penalty(oracle.output_conv(*exact_inputs), exact_inputs), strict=True):
        assert oracle.error(result, exact) <= 1e-5


# ----------------------------------------------------------------------------------------- PyTorch citizenship


@pytest.mark.sampled(3)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced-nhwc"])
def test_opcheck(layout: str, requires_grad: bool, target: Target) -> None:
    inputs = [t.requires_grad_(requires_grad) for t in random_inputs(CASES[1], torch.float32, target.device, layout)]
    for memory_format in FORMATS.values():
        # The weight's gradient is a product over all pixels: dynamic shapes reorder its sum.
        options = {"memory_format": memory_format}
        target.opcheck(torch.ops.fpn_kernels.output_conv.default, tuple(inputs), options, rtol=1e-4, atol=1e-5)


def test_empty_batch(target: Target) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(Case(0, 5, 3, (4, 4)), torch.float32, target.device)]
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.output_conv(*inputs)
        result.sum().backward()
    assert result.shape == (0, 3, 4, 4)
    for tensor in inputs:
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_autocast_runs_in_the_autocast_dtype(target: Target) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(CASES[0], torch.float32, target.device)]
    with torch.autocast(target.device, dtype=torch.bfloat16), target.serves("output_conv"):
        result = fpn_kernels.output_conv(*inputs)
    halves = [tensor.detach().bfloat16() for tensor in inputs]
    assert oracle.no_worse_than_eager(result, reference.output_conv(*halves), oracle.output_conv(*halves))
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_compile_with_symbolic_sizes(target: Target) -> None:
    torch._dynamo.reset()  # the limit of recompilations counts over all tests of this function

    def call(*tensors: Tensor) -> Tensor:
        return fpn_kernels.output_conv(*tensors, memory_format=torch.channels_last).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (CASES[0], CASES[1], CASES[6]):
        inputs = [tensor.requires_grad_() for tensor in random_inputs(case, torch.float32, target.device)]
        with fpn_kernels.use_backend(target.backend):
            result, expected = compiled(*inputs), call(*inputs)
            gradients = torch.autograd.grad(result.sum(), inputs)
            for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(result, expected) and result.stride() == expected.stride()


def test_export_keeps_the_operator() -> None:
    class Output(torch.nn.Module):
        def forward(self, feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fpn_kernels.output_conv(feature, weight, bias)

    inputs = random_inputs(CASES[1], torch.float32, "cpu")
    program = torch.export.export(Output(), inputs)
    assert any("fpn_kernels.output_conv" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), fpn_kernels.output_conv(*inputs))


def test_explain_says_who_serves() -> None:
    feature, weight, bias = random_inputs(CASES[1], torch.float32, "cpu")
    explanation = fpn_kernels.explain(fpn_kernels.output_conv, feature, weight, bias)
    assert explanation.backend == ("eager" if native.load_error() else "native")
    with fpn_kernels.use_backend("eager"):
        assert fpn_kernels.explain("output_conv", feature, weight).backend == "eager"


BAD = {
    "feature": (lambda f, w, b: (None, w, b), {}, TypeError, "feature: expected a tensor, got NoneType"),
    "weight": (lambda f, w, b: (f, [1], b), {}, TypeError, "weight: expected a tensor, got list"),
    "bias": (lambda f, w, b: (f, w, 1), {}, TypeError, "bias: expected a tensor or None, got int"),
    "rank": (lambda f, w, b: (f[0], w, b), {}, ValueError, "feature: expected 4 dimensions"),
    "no channels": (lambda f, w, b: (f[:, :0], w[:, :0], b), {}, ValueError, "feature: expected at least one channel"),
    "1x1": (lambda f, w, b: (f, w[..., :1, :1], b), {}, ValueError, r"weight: .*\[Cout, 2, 3, 3\], got \[4, 2, 1"),
    "a flat weight": (lambda f, w, b: (f, w[..., 0, 0], b), {}, ValueError, r"weight: .*got \[4, 2\]"),
    "channels": (lambda f, w, b: (f[:, :1], w, b), {}, ValueError, r"weight: .*\[Cout, 1, 3, 3\]"),
    "size of bias": (lambda f, w, b: (f, w, b[1:]), {}, ValueError, r"bias: .*\[4\], got \[3\]"),
    "dtype": (lambda f, w, b: (f.double(), w, b), {}, TypeError, "weight: expected the dtype of feature"),
    "integers": (lambda f, w, b: (f.int(), w, b), {}, TypeError, "feature: .*got torch.int32"),
    "device": (lambda f, w, b: (f, w.to("meta"), b), {}, ValueError, "weight: expected the device of feature"),
    "format": (
        lambda f, w, b: (f, w, b),
        {"memory_format": torch.channels_last_3d},
        ValueError,
        "memory_format: .*got torch.channels_last_3d",
    ),
    "type of format": (
        lambda f, w, b: (f, w, b),
        {"memory_format": "NHWC"},
        TypeError,
        "memory_format: expected a torch.memory_format, got str",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    make, keywords, error, message = BAD[case]
    inputs = make(torch.randn(1, 2, 4, 4), torch.randn(4, 2, 3, 3), torch.randn(4))
    with pytest.raises(error, match=message):
        fpn_kernels.output_conv(*inputs, **keywords)


def test_the_oracle_is_a_convolution() -> None:
    inputs = random_inputs(CASES[1], torch.float64, "cpu")
    torch.testing.assert_close(oracle.output_conv(*inputs), F.conv2d(*inputs, padding=1))
