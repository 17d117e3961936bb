"""`upsample_add` and its backward, on every backend that is here."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from samples import LAYOUTS, MERGES, Sizes, random_map
from targets import Target, parameters

import fpn_kernels
from fpn_kernels import reference, resampling

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = list(resampling.MODES)


@pytest.fixture(params=parameters("upsample_add"), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend that has this operator and its backward, on a device."""
    chosen: Target = request.param
    return chosen


def _pair(
    sizes: Sizes,
    dtype: torch.dtype,
    device: str = "cpu",
    layouts: tuple[str, str] = ("nchw", "nchw"),
) -> tuple[torch.Tensor, torch.Tensor]:
    top = random_map((sizes.batch, sizes.channels, *sizes.top), dtype, device, layouts[0])
    return top, random_map((sizes.batch, sizes.channels, *sizes.fine), dtype, device, layouts[1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
@pytest.mark.parametrize("sizes", MERGES, ids=str)
def test_nearest_equals_eager_bit_for_bit(sizes: Sizes, mode: str, dtype: torch.dtype, target: Target) -> None:
    target.require(dtype)
    top, lateral = _pair(sizes, dtype, target.device)
    with target.serves("upsample_add"):
        result = fpn_kernels.upsample_add(top, lateral, mode=mode)
    # The sum of two numbers, rounded once, has one right answer: through float64 it is the same one.
    assert torch.equal(result.cpu(), oracle.upsample_add(top, lateral, mode).to(dtype))
    axes = zip(sizes.top, sizes.fine, strict=True)
    if target.device == "cuda" or all(resampling.indices_agree(i, o, mode, dtype) for i, o in axes):
        assert torch.equal(result, reference.upsample_add(top, lateral, mode=mode))


@pytest.mark.parametrize("gain", [1.0, 0.5, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_is_rounded_once(mode: str, dtype: torch.dtype, gain: float, target: Target) -> None:
    target.require(dtype)
    for sizes in target.affordable(MERGES[3:]):
        top, lateral = _pair(sizes, dtype, target.device)
        with target.serves("upsample_add"):
            result = fpn_kernels.upsample_add(top, lateral, mode=mode, gain=gain)
        exact = oracle.upsample_add(top, lateral, mode, gain)
        largest = float(top.abs().max() + lateral.abs().max())
        # A bilinear position is rounded at its own size, and its weight by as much.
        spread = max(sizes.top) if mode == "bilinear" else 1
        oracle.within_rounding(result, exact, largest * spread)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_any_strides(layouts: tuple[str, str], mode: str, target: Target) -> None:
    sizes = Sizes(2, 6, (3, 5), (7, 10), "small, uneven, and not one vector wide")
    top, lateral = _pair(sizes, torch.float32, target.device, layouts)
    before = top.clone(), lateral.clone()
    with target.serves("upsample_add"):
        result = fpn_kernels.upsample_add(top, lateral, mode=mode)
    oracle.within_rounding(result, oracle.upsample_add(top, lateral, mode), 8 * float(top.abs().max()))
    is_nhwc = layouts[1] in ("nhwc", "sliced-nhwc")
    assert result.is_contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)
    assert torch.equal(top, before[0]) and torch.equal(lateral, before[1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "misaligned", "expanded", "sliced-nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_backward_is_the_exact_adjoint(mode: str, dtype: torch.dtype, layout: str, target: Target) -> None:
    target.require(dtype)
    for sizes in target.affordable(MERGES):
        top, lateral = _pair(sizes, dtype, target.device)
        top.requires_grad_()
        lateral.requires_grad_()
        grad = random_map(lateral.shape, dtype, target.device, layout)
        result = fpn_kernels.upsample_add(top, lateral, mode=mode, gain=0.5)
        with target.serves("upsample_add_backward"):
            grad_top, grad_lateral = torch.autograd.grad(result, (top, lateral), grad)
        assert torch.equal(grad_lateral, 0.5 * grad)
        exact = _adjoint(grad, sizes, mode, dtype) * 0.5
        terms = _adjoint(grad.abs(), sizes, mode, dtype)
        oracle.within_rounding(grad_top, exact, terms * max(8, max(sizes.fine)))


def _adjoint(grad: torch.Tensor, sizes: Sizes, mode: str, dtype: torch.dtype) -> torch.Tensor:
    rows = oracle.resize_matrix(sizes.top[0], sizes.fine[0], mode, dtype)
    columns = oracle.resize_matrix(sizes.top[1], sizes.fine[1], mode, dtype)
    return torch.einsum("yh,ncyx,xw->nchw", rows, grad.double().cpu(), columns)


@pytest.mark.parametrize("mode", MODES)
def test_the_backward_repeats_bit_for_bit(mode: str, target: Target) -> None:
    grad = random_map((2, 4, 38, 57), torch.float32, target.device)
    with target.serves("upsample_add_backward"):
        first, second = (torch.ops.fpn_kernels.upsample_add_backward(grad, (19, 29), mode=mode) for _ in range(2))
    assert torch.equal(first, second)


def test_only_the_gradients_asked_for_are_computed(target: Target) -> None:
    top, lateral = _pair(MERGES[0], torch.float32, target.device)
    lateral.requires_grad_()
    with target.serves("upsample_add"):
        fpn_kernels.upsample_add(top, lateral).sum().backward()
    assert lateral.grad is not None and torch.equal(lateral.grad, torch.ones_like(lateral))


@pytest.mark.parametrize("mode", MODES)
def test_double_backward(mode: str, target: Target) -> None:
    """The second derivative against the oracle's, in the widest dtype that the backend computes."""
    dtype = target.dtypes()[-1] if target.backend != "triton" else torch.float32
    top, lateral = _pair(MERGES[8], dtype, target.device)
    grad = random_map(lateral.shape, dtype, target.device).requires_grad_()
    direction = random_map(top.shape, dtype, target.device)
    result = fpn_kernels.upsample_add(top.requires_grad_(), lateral, mode=mode, gain=0.7)
    with target.serves("upsample_add_backward"):
        (grad_top,) = torch.autograd.grad(result, top, grad, create_graph=True)
    with target.serves("upsample_add"):
        (second,) = torch.autograd.grad(grad_top, grad, direction)
    exact = 0.7 * oracle.resize(direction, MERGES[8].fine, mode)
    assert oracle.error(second, exact) <= 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [((3, 2), (7, 5)), ((1, 1), (3, 2)), ((4, 3), (3, 2))], ids=str)
def test_gradcheck(sizes: tuple[tuple[int, int], tuple[int, int]], mode: str, target: Target) -> None:
    target.require(torch.float64)
    top = random_map((2, 2, *sizes[0]), torch.float64, target.device).requires_grad_()
    lateral = random_map((2, 2, *sizes[1]), torch.float64, target.device).requires_grad_()

    def merge(top: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
        return fpn_kernels.upsample_add(top, lateral, mode=mode, gain=0.7)

    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(merge, (top, lateral))
        assert torch.autograd.gradgradcheck(merge, (top, lateral))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced-nhwc", "permuted"])
def test_opcheck(layout: str, mode: str, requires_grad: bool, target: Target) -> None:
    sizes = Sizes(2, 4, (3, 5), (7, 10), "uneven")
    top, lateral = _pair(sizes, torch.float32, target.device, (layout, layout))
    top.requires_grad_(requires_grad)
    lateral.requires_grad_(requires_grad)
    operators = torch.ops.fpn_kernels
    target.opcheck(operators.upsample_add.default, (top, lateral), {"mode": mode, "gain": 0.5})
    target.opcheck(operators.upsample_add_backward.default, (lateral, sizes.top), {"mode": mode, "gain": 0.5})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no images", "no channels"])
def test_empty(shape: tuple[int, int], mode: str, target: Target) -> None:
    top = torch.empty(*shape, 2, 3, device=target.device, requires_grad=True)
    lateral = torch.empty(*shape, 4, 6, device=target.device, requires_grad=True)
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.upsample_add(top, lateral, mode=mode)
        result.sum().backward()
    assert result.shape == lateral.shape
    assert top.grad is not None and top.grad.shape == top.shape


def test_autocast_runs_in_the_autocast_dtype(target: Target) -> None:
    top, lateral = _pair(MERGES[0], torch.float32, target.device)
    top.requires_grad_()
    with torch.autocast(target.device, dtype=torch.bfloat16), target.serves("upsample_add"):
        result = fpn_kernels.upsample_add(top, lateral.bfloat16())
    assert result.dtype == torch.bfloat16
    assert torch.equal(result.cpu(), oracle.upsample_add(top.detach().bfloat16(), lateral.bfloat16()).bfloat16())
    result.float().sum().backward()
    assert top.grad is not None and top.grad.dtype == torch.float32
    assert torch.equal(top.grad, torch.full_like(top, 4.0))


def test_autocast_leaves_float64_alone() -> None:
    top, lateral = _pair(MERGES[0], torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fpn_kernels.upsample_add(top, lateral).dtype == torch.float64


BAD = {
    "top is a list": (lambda t, x: ([t], x), {}, TypeError, "top: expected a tensor, got list"),
    "lateral is None": (lambda t, x: (t, None), {}, TypeError, "lateral: expected a tensor, got NoneType"),
    "rank": (lambda t, x: (t[0], x), {}, ValueError, r"top: expected 4 dimensions.*got 3: \[4, 2, 3\]"),
    "rank of lateral": (lambda t, x: (t, x[None]), {}, ValueError, "lateral: expected 4 dimensions.*got 5"),
    "channels": (lambda t, x: (t[:, :3], x), {}, ValueError, r"top: .*\[2, 4, h, w\], got \[2, 3, 2, 3\]"),
    "batch": (lambda t, x: (t[:1], x), {}, ValueError, r"top: .*got \[1, 4, 2, 3\]"),
    "no pixels": (lambda t, x: (t[:, :, :0], x), {}, ValueError, "top: expected at least one pixel"),
    "no pixels in lateral": (lambda t, x: (t, x[..., :0]), {}, ValueError, "lateral: expected at least one pixel"),
    "integers": (lambda t, x: (t.long(), x), {}, TypeError, "top: .*float64, got torch.int64"),
    "two dtypes": (lambda t, x: (t.double(), x), {}, TypeError, "top: .*lateral, torch.float32, got torch.float64"),
    "sparse": (lambda t, x: (t, x.to_sparse()), {}, TypeError, "lateral: expected a dense"),
    "device": (lambda t, x: (t, x.to("meta")), {}, ValueError, "top: expected the device of lateral, meta, got"),
    "mode": (lambda t, x: (t, x), {"mode": "bicubic"}, ValueError, "mode: expected one of 'nearest'.*'bicubic'"),
    "type of mode": (lambda t, x: (t, x), {"mode": 2}, TypeError, "mode: expected a string, got int"),
    "gain": (lambda t, x: (t, x), {"gain": "0.5"}, TypeError, "gain: expected a number, got str"),
    "gain is a flag": (lambda t, x: (t, x), {"gain": True}, TypeError, "gain: expected a number, got bool"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, target: Target) -> None:
    make, keywords, error, message = BAD[case]
    top = random_map((2, 4, 2, 3), torch.float32, target.device)
    lateral = random_map((2, 4, 4, 6), torch.float32, target.device)
    before = top.clone(), lateral.clone()
    arguments = make(top, lateral)
    with fpn_kernels.use_backend(target.backend), pytest.raises(error, match=message):
        fpn_kernels.upsample_add(*arguments, **keywords)
    assert torch.equal(top, before[0]) and torch.equal(lateral, before[1])


@pytest.mark.parametrize("top_size", [(0, 3), (2,), (2, 3, 4)], ids=str)
def test_a_bad_size_of_the_gradient_is_named(top_size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="top_size: expected two sizes"):
        torch.ops.fpn_kernels.upsample_add_backward(torch.ones(1, 1, 4, 4), top_size)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", MODES)
def test_compile_with_symbolic_sizes(mode: str, target: Target) -> None:
    torch._dynamo.reset()  # the limit of recompilations counts over all tests of this function
    compiled = torch.compile(
        lambda top, lateral: fpn_kernels.upsample_add(top, lateral, mode=mode).relu(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for sizes in target.affordable((MERGES[0], MERGES[5], MERGES[8], MERGES[9])):
        top, lateral = (tensor.requires_grad_() for tensor in _pair(sizes, torch.float32, target.device))
        with target.serves("upsample_add", "upsample_add_backward"):
            result = compiled(top, lateral)
            gradient = torch.autograd.grad(result.sum(), top)[0]
            expected = fpn_kernels.upsample_add(top, lateral, mode=mode).relu()
            assert torch.equal(result, expected)
            assert torch.equal(gradient, torch.autograd.grad(expected.sum(), top)[0])


def test_export_keeps_the_operator() -> None:
    class Merge(torch.nn.Module):
        def forward(self, top: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
            return fpn_kernels.upsample_add(top, lateral)

    top, lateral = _pair(MERGES[8], torch.float32)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(
        Merge(), (top, lateral), dynamic_shapes={"top": None, "lateral": {2: height, 3: width}}
    )
    assert any("upsample_add" in str(node.target) for node in program.graph.nodes)
    other = random_map((1, 6, 9, 11), torch.float32)
    assert torch.equal(program.module()(top, other), fpn_kernels.upsample_add(top, other))
