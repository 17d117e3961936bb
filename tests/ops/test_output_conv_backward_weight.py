"""`output_conv_backward_weight`, on every backend that is here, and where `output_conv` calls it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from functorch.compile import make_boxed_func
from samples import LAYOUTS, random_map
from targets import INTERPRETED, Target
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import fpn_kernels
from fpn_kernels.backends import convolution, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
OPERATOR = torch.ops.fpn_kernels.output_conv_backward_weight.default


class Case(NamedTuple):
    batch: int
    cin: int
    cout: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.batch}x{self.cin}-to-{self.cout}-{self.size[0]}x{self.size[1]}"


CASES = [
    Case(1, 64, 32, (8, 12)),
    Case(2, 5, 10, (10, 13)),
    Case(1, 1, 3, (1, 1)),
    Case(3, 2, 17, (50, 1)),
    Case(1, 256, 256, (5, 7)),
    Case(2, 16, 16, (38, 57)),
]
# Smaller where a tile takes the interpreter tens of milliseconds.
WHOLE_VECTORS = Case(2, 16, 16, (9, 14)) if INTERPRETED else CASES[-1]


def _maps(case: Case, dtype: torch.dtype, device: str, layouts: tuple[str, str] = ("nchw", "nchw")) -> list[Tensor]:
    channels = (case.cout, case.cin)
    return [
        random_map((case.batch, c, *case.size), dtype, device, layout)
        for c, layout in zip(channels, layouts, strict=True)
    ]


def exact(grad: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the oracle's convolution, in float64."""
    leaves = [
        torch.zeros(grad.shape[1], feature.shape[1], 3, 3, dtype=torch.float64, requires_grad=True),
        torch.zeros(grad.shape[1], dtype=torch.float64, requires_grad=True),
    ]
    of_weight, of_bias = torch.autograd.grad(oracle.output_conv(feature, *leaves), leaves, grad.double().cpu())
    return of_weight, of_bias


@pytest.mark.sampled(3)
@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("layouts", list(itertools.product(["nchw", "nhwc"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_float64(
    case: Case, dtype: torch.dtype, layouts: tuple[str, str], asked: str, target: Target
) -> None:
    target.require(dtype)
    grad, feature = _maps(case, dtype, target.device, layouts)
    with target.serves("output_conv_backward_weight"):
        ours = OPERATOR(grad, feature, memory_format=FORMATS[asked])
        alone, nothing = OPERATOR(grad, feature, wants_bias=False, memory_format=FORMATS[asked])
    _, *eager = convolution.gradients(grad, feature, None, True)
    for result, theirs, true in zip(ours, eager, exact(grad, feature), strict=True):
        assert result.dtype == dtype and result.shape == true.shape
        assert oracle.no_worse_than_eager(result, theirs, true)
    assert ours[0].is_contiguous(memory_format=FORMATS[asked])
    assert torch.equal(alone, ours[0]) and nothing.shape == (0,) and nothing.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, dtype: torch.dtype, target: Target) -> None:
    grad, feature = _maps(Case(2, 6, 5, (7, 8)), dtype, target.device, (layout, layout))
    before = [tensor.clone() for tensor in (grad, feature)]
    with target.serves("output_conv_backward_weight"):
        ours = OPERATOR(grad, feature)
    _, *eager = convolution.gradients(*before, None, True)
    for result, theirs, true in zip(ours, eager, exact(grad, feature), strict=True):
        assert oracle.no_worse_than_eager(result, theirs, true)
    assert ours[0].is_contiguous() and all(map(torch.equal, (grad, feature), before))


@pytest.mark.parametrize("wants_bias", [False, True])
def test_gradcheck(wants_bias: bool, target: Target) -> None:
    """Twice more, so that `output_conv` may be differentiated three times."""
    target.require(torch.float64)
    maps = [tensor.requires_grad_() for tensor in _maps(Case(2, 3, 2, (4, 3)), torch.float64, target.device)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = OPERATOR(*tensors, wants_bias=wants_bias)
        return results if wants_bias else results[:1]

    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(call, maps)
        assert torch.autograd.gradgradcheck(call, maps)


@pytest.mark.parametrize("frozen", ["grad", "feature"])
def test_only_the_gradients_asked_for(frozen: str, target: Target) -> None:
    """Each in the layout of what it is the gradient of."""
    grad, feature = _maps(CASES[1], torch.float32, target.device, ("nhwc", "nchw"))
    wanted = feature if frozen == "grad" else grad
    wanted.requires_grad_()
    with target.serves("output_conv_backward_weight"):
        of_weight, of_bias = OPERATOR(grad, feature)
    with target.serves("output_conv"):
        (gradient,) = torch.autograd.grad((of_weight**2).sum() + (of_bias**2).sum(), wanted)
    assert gradient.stride() == wanted.stride()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layouts", [("nchw", "nchw"), ("nhwc", "nhwc"), ("sliced-nhwc", "nchw")], ids="-".join)
def test_opcheck(layouts: tuple[str, str], requires_grad: bool, target: Target) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        maps = [t.requires_grad_(requires_grad) for t in _maps(CASES[1], dtype, target.device, layouts)]
        # Dynamic shapes reorder the sums.
        bounds = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        for wants_bias, asked in itertools.product([False, True], FORMATS.values()):
            target.opcheck(OPERATOR, tuple(maps), {"wants_bias": wants_bias, "memory_format": asked}, **bounds)


def test_no_map(target: Target) -> None:
    maps = _maps(Case(0, 5, 3, (4, 4)), torch.bfloat16, target.device)
    with fpn_kernels.use_backend(target.backend):
        of_weight, of_bias = OPERATOR(*maps)
    assert torch.equal(of_weight, of_weight.new_zeros(3, 5, 3, 3)) and torch.equal(of_bias, of_bias.new_zeros(3))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_has_the_layout_of_the_weight(dtype: torch.dtype, weight_format: str, target: Target) -> None:
    """A gradient laid out in another way would be copied once more when it is kept."""
    grad, feature = _maps(WHOLE_VECTORS, dtype, target.device, ("nhwc", "nhwc"))
    weight = random_map((16, 16, 3, 3), dtype, target.device, weight_format).requires_grad_()
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.output_conv(feature, weight)
        (of_weight,) = torch.autograd.grad(result, weight, grad)
    assert of_weight.stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_training_step(dtype: torch.dtype, target: Target) -> None:
    """Symbolic sizes, and the operator in the graph of the backward."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def keep(module: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(module)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=lambda module, _: make_boxed_func(module.forward), bw_compiler=keep)
    compiled = torch.compile(fpn_kernels.output_conv, fullgraph=True, dynamic=True, backend=backend)
    # On a GPU, and in bfloat16 where oneDNN multiplies it: ATen's one call has both gradients, in layouts of its own.
    by_onednn = convolution.onednn_multiplies(dtype) and not native.multiplies_by_tiles(dtype)
    apart = target.device == "cpu" and (dtype != torch.bfloat16 or not by_onednn)
    for case in (WHOLE_VECTORS, CASES[1]):
        grad, feature = _maps(case, dtype, target.device, ("nhwc", "nhwc"))
        inputs = [feature, random_map((case.cout, case.cin, 3, 3), dtype, target.device), grad[0, :, 0, 0].clone()]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with fpn_kernels.use_backend(target.backend):
            ours = torch.autograd.grad(compiled(*inputs), inputs, grad)
        for result, theirs in zip(ours[1:], OPERATOR(grad, feature.detach()), strict=True):
            torch.testing.assert_close(result, theirs, rtol=2e-2, atol=1e-3)
            assert result.stride() == theirs.stride() or not apart
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    name = "fpn_kernels.output_conv_backward_weight.default" if apart else "aten.convolution_backward.default"
    assert names.count(name) == len(graphs) > 0


BAD = {
    "rank": (lambda g, f: (g[0], f), {}, ValueError, "grad: expected 4 dimensions"),
    "integers": (lambda g, f: (g, f.int()), {}, TypeError, "feature: .*got torch.int32"),
    "dtype": (lambda g, f: (g.double(), f), {}, TypeError, "feature: expected the dtype of grad"),
    "device": (lambda g, f: (g, f.to("meta")), {}, ValueError, "feature: expected the device of grad"),
    "no channels": (lambda g, f: (g, f[:, :0]), {}, ValueError, "feature: expected at least one channel"),
    "no channels of grad": (lambda g, f: (g[:, :0], f), {}, ValueError, "grad: expected at least one channel"),
    "size": (lambda g, f: (g, f[:, :, 1:]), {}, ValueError, r"feature: .*\[1, Cin, 4, 5\], got \[1, 2, 3, 5\]"),
    "batch": (lambda g, f: (g, f.expand(2, -1, -1, -1)), {}, ValueError, r"feature: .*got \[2, 2, 4, 5\]"),
    "format": (
        lambda g, f: (g, f),
        {"memory_format": torch.channels_last_3d},
        ValueError,
        "memory_format: .*got torch.channels_last_3d",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    make, keywords, error, message = BAD[case]
    with pytest.raises(error, match=message):
        OPERATOR(*make(torch.randn(1, 3, 4, 5), torch.randn(1, 2, 4, 5)), **keywords)
