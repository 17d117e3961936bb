"""What every operator promises, over the samples of `operators.py`, on every backend that this machine has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from operators import OPERATORS, PUBLIC
from samples import LAYOUTS, Make, Operator, Sample, of_tensors, tensors_of
from targets import INTERPRETED, Target, record_calls
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils import _pytree as pytree

import fpn_kernels

ALL = [pytest.param(op, id=str(op)) for op in OPERATORS]
ONLY_PUBLIC = [pytest.param(op, id=str(op)) for op in PUBLIC]
SAMPLES = [
    pytest.param(op, sample, id=f"{op}: {sample.why}")
    for op in OPERATORS
    # Under the interpreter the first two: the tests of the Triton kernels cover the other branches.
    for sample in (op.samples[:2] if INTERPRETED else op.samples)
]
# Each dtype in several layouts, each layout in several dtypes.  The maps of a call take the layouts in turn.
PLACED = [
    (torch.float32, ("nchw",)),
    (torch.bfloat16, ("nhwc",)),
    (torch.float16, ("nhwc", "sliced-nhwc")),
    (torch.float64, ("permuted", "nchw")),
    (torch.float32, ("expanded", "nhwc", "sliced")),
    (torch.bfloat16, ("nchw", "misaligned")),
    (torch.float16, ("sliced", "permuted")),
    (torch.float64, ("nhwc",)),
    (torch.float32, ("sliced-nhwc", "expanded")),
    (torch.float32, ("misaligned", "nhwc")),
    (torch.bfloat16, ("sliced-nhwc", "nchw")),
][: 3 if INTERPRETED else None]
assert INTERPRETED or {layout for _, layouts in PLACED for layout in layouts} == set(LAYOUTS)


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    """Skip an operator or a sample that the backend leaves to eager, which is a target of its own."""
    if "target" not in request.fixturenames:
        return
    target: Target = request.getfixturevalue("target")
    op = request.getfixturevalue("op")
    sample = request.getfixturevalue("sample") if "sample" in request.fixturenames else op.samples[0]
    if not target.has(op.name):
        pytest.skip(f"{target} has only {', '.join(target.operators)}")
    if target.backend == "triton" and sample.not_triton:
        pytest.skip("triton leaves this call to eager")
    names = op.served_as or (op.name,)
    if not any(target.implements(name) for name in names):
        pytest.skip(f"{target.backend} has no implementation of {op}")


@contextmanager
def _computed_by(target: Target, op: Operator) -> Iterator[None]:
    """Force the backend, and assert that it computed the operator."""
    with fpn_kernels.use_backend(target.backend), record_calls() as calls:
        yield
    assert {(name, target.backend) for name in op.served_as or (op.name,)} & set(calls)


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _wide(arguments: Any) -> Any:
    """The same numbers in float64 on the CPU, as leaves."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().double().cpu().requires_grad_(), arguments)


def _leaves(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), arguments)


def _gradients(results: Sequence[Tensor], arguments: Any, upstream: Sequence[Tensor]) -> list[Tensor]:
    return list(
        torch.autograd.grad(results, tensors_of(arguments), [u.to(r) for u, r in zip(upstream, results, strict=True)])
    )


def _no_worse(result: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    is_map = result.dim() == 4 and result.shape[2:] not in ((1, 1), (3, 3))
    return oracle.no_worse_than_eager(result, eager, exact, sum_over_pixels_of=None if is_map else dtype)


def _laid_out(op: Operator, sample: Sample, arguments: Any, results: Sequence[Tensor]) -> None:
    required = sample.options.get("memory_format")
    for result, like in zip(results, op.like(*arguments), strict=False):
        assert result.is_contiguous(memory_format=required or suggest_memory_format(like))


# ----------------------------------------------------------------------------------------------------- numbers


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_numbers_dtypes_and_layouts(op: Operator, sample: Sample, target: Target) -> None:
    """No worse than eager against float64, in the promised layout and the maps' dtype, the same at each call."""
    for dtype, layouts in PLACED:
        if dtype not in target.dtypes():
            continue
        arguments = sample.arguments(Make(dtype, target.device, *layouts))
        before = [tensor.clone() for tensor in tensors_of(arguments)]
        with _computed_by(target, op):
            results = _flat(op.call(*arguments, **sample.options))
            again = _flat(op.call(*arguments, **sample.options))
        eager = _flat(op.eager(*arguments, **sample.options))
        exact = _flat(op.exact(*arguments, **sample.options))
        _laid_out(op, sample, arguments, results)
        for result, same, theirs, true in zip(results, again, eager, exact, strict=True):
            assert result.dtype == theirs.dtype and result.shape == true.shape
            assert _no_worse(result, theirs, true, dtype), (dtype, layouts)
            assert torch.equal(result, same)
        assert all(map(torch.equal, tensors_of(arguments), before)), "an input was written to"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_gradients(op: Operator, sample: Sample, target: Target) -> None:
    for dtype, layouts in PLACED[::2] if INTERPRETED else PLACED:
        if dtype not in target.dtypes():
            continue
        arguments = _leaves(sample.arguments(Make(dtype, target.device, *layouts)))
        wide = _wide(arguments)
        exact = _flat(op.exact(*wide, **sample.options))
        upstream = [torch.randn(result.shape, dtype=torch.float64).to(dtype) for result in exact]
        true = _gradients(exact, wide, upstream)
        theirs = _gradients(_flat(op.eager(*arguments, **sample.options)), arguments, upstream)
        with fpn_kernels.use_backend(target.backend):
            results = _flat(op.call(*arguments, **sample.options))
            ours, again = (
                torch.autograd.grad(
                    results,
                    tensors_of(arguments),
                    [u.to(r) for u, r in zip(upstream, results, strict=True)],
                    retain_graph=True,
                )
                for _ in range(2)
            )
        for place, leaf in enumerate(tensors_of(arguments)):
            assert ours[place].dtype == leaf.dtype and ours[place].shape == leaf.shape
            assert _no_worse(ours[place], theirs[place], true[place], dtype), (dtype, layouts, place)
            assert torch.equal(ours[place], again[place])


@pytest.mark.parametrize("op", ALL)
def test_gradients_of_the_inputs_that_require_them(op: Operator, target: Target) -> None:
    """Each input alone, and none: the numbers are those where all inputs require a gradient."""
    sample = op.samples[0]
    arguments = sample.arguments(Make(torch.float32, target.device, "nhwc", "nchw"))
    call, tensors = of_tensors(op.call, arguments, sample.options), tensors_of(arguments)
    with fpn_kernels.use_backend(target.backend):
        upstream = [torch.randn_like(result) for result in call(*tensors)]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(call(*leaves), leaves, upstream)
        assert not any(result.requires_grad for result in call(*tensors))
        for place, tensor in enumerate(tensors):
            alone = tensor.detach().requires_grad_()
            recorded = call(*tensors[:place], alone, *tensors[place + 1 :])
            pairs = [(r, u) for r, u in zip(recorded, upstream, strict=True) if r.requires_grad]
            (gradient,) = torch.autograd.grad([r for r, _ in pairs], alone, [u for _, u in pairs])
            torch.testing.assert_close(gradient, expected[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_gradcheck(op: Operator, sample: Sample, target: Target) -> None:
    """First and second derivatives against finite differences."""
    target.require(torch.float64)
    arguments = sample.arguments(Make(torch.float64, target.device))
    if sum(tensor.numel() for tensor in tensors_of(arguments)) > 1500:
        pytest.skip("hundreds of calls for each element: other samples of the operator are smaller")
    leaves = [tensor.requires_grad_() for tensor in tensors_of(arguments)]
    function = of_tensors(op.call, arguments, sample.options)
    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("op", ALL)
def test_a_gradient_penalty(op: Operator, target: Target) -> None:
    """Second derivatives in float32, as in training, against those of the oracle."""
    sample = op.samples[0]
    arguments = _leaves(sample.arguments(Make(torch.float32, target.device)))

    def penalty(function: Any, arguments: Any) -> tuple[Tensor, ...]:
        leaves = tensors_of(arguments)
        total = sum((result**2).sum() for result in _flat(function(*arguments, **sample.options)))
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves)

    with fpn_kernels.use_backend(target.backend):
        ours = penalty(op.call, arguments)
    for result, true in zip(ours, penalty(op.exact, _wide(arguments)), strict=True):
        assert oracle.error(result, true) <= 2e-5


@pytest.mark.parametrize("op", ALL)
def test_empty_batch(op: Operator, target: Target) -> None:
    for sample in op.samples:
        arguments = _leaves(sample.arguments(Make(torch.float32, target.device, empty=True)))
        with fpn_kernels.use_backend(target.backend):
            results = _flat(op.call(*arguments, **sample.options))
            gradients = torch.autograd.grad([r.sum() for r in results], tensors_of(arguments))
        for result, exact in zip(results, _flat(op.exact(*arguments, **sample.options)), strict=True):
            assert result.shape == exact.shape and not result.any()
        # A bias alone still reaches a result, whose sum has no terms.
        assert all(
            gradient.shape == leaf.shape for gradient, leaf in zip(gradients, tensors_of(arguments), strict=True)
        )
        assert not any(gradient.any() for gradient in gradients)


# ------------------------------------------------------------------------------------------------------ errors

BAD = [pytest.param(op, name, id=f"{op}: {name}") for op in OPERATORS for name in op.bad]


@pytest.mark.parametrize(("op", "name"), BAD)
def test_bad_input_is_named(op: Operator, name: str) -> None:
    """Before anything is computed, and with gradients as without; the error is that of the user's own call."""
    bad, sample = op.bad[name], op.samples[0]
    options = sample.options | bad.options
    for leaves in (lambda arguments: arguments, _leaves):
        arguments = leaves(sample.arguments(Make()))
        if op.name in ("output_conv_levels", "top_down_pathway"):  # every level has a bias here
            arguments = (*arguments[:2], [torch.zeros(10)] * 3)
        with record_calls() as calls, pytest.raises(bad.error, match=bad.message):
            op.call(*bad.change(*arguments), **options)
        assert calls == []


# ----------------------------------------------------------------------------------------- PyTorch citizenship


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("op", "sample"), SAMPLES[:: 3 if INTERPRETED else 1])
def test_opcheck(op: Operator, sample: Sample, requires_grad: bool, target: Target) -> None:
    arguments = sample.arguments(
        Make(torch.float32, target.device, *(("nhwc", "sliced-nhwc") if requires_grad else ("nchw",)))
    )
    for tensor in tensors_of(arguments):
        tensor.requires_grad_(requires_grad)
    # A second per sample for the compiler, which sees the same operator with every sample and backend.
    compiled = sample is op.samples[0] and requires_grad and target.backend != "eager"
    # Dynamic shapes reorder the sums over pixels.
    bounds = {"rtol": 1e-4, "atol": 1e-4}
    target.opcheck(op.overload, op.arguments(*arguments), sample.options, compiled=compiled, **bounds)


@pytest.mark.parametrize("op", ONLY_PUBLIC)
def test_autocast_runs_in_its_dtype(op: Operator, target: Target) -> None:
    """As on maps that are cast before; a gradient is float32; float64 and fusion weights are left alone."""
    sample = op.samples[0]
    arguments = _leaves(sample.arguments(Make(torch.float32, target.device)))
    fusion = op.name == "weighted_merge"
    cast = pytree.tree_map_only(
        Tensor, lambda t: t.detach() if fusion and t.dim() == 1 else t.detach().bfloat16(), arguments
    )
    with fpn_kernels.use_backend(target.backend):
        with torch.autocast(target.device, dtype=torch.bfloat16):
            results = _flat(op.call(*arguments, **sample.options))
        expected = _flat(op.call(*cast, **sample.options))
        gradients = torch.autograd.grad(sum(r.float().sum() for r in results), tensors_of(arguments))
    for result, same in zip(results, expected, strict=True):
        assert result.dtype == torch.bfloat16
        assert oracle.error(result, same.double().cpu()) <= 2**-8
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(
            r.dtype == torch.float64 for r in _flat(op.call(*sample.arguments(Make(torch.float64)), **sample.options))
        )


@pytest.mark.parametrize("op", ONLY_PUBLIC)
def test_compile_with_symbolic_sizes(op: Operator) -> None:
    """One graph, forward and backward; each call has the bits of the call that is not compiled.

    By the backend that serves here: the compiler sees the same operator with each of them.
    """
    torch._dynamo.reset()  # the limit of recompilations counts over all tests of this function
    sample = op.samples[0]

    def call(*arguments: Any) -> list[Tensor]:
        return [result.relu() for result in _flat(op.call(*arguments, **sample.options))]

    def narrower(tensor: Tensor) -> Tensor:
        return tensor[..., :-1] if tensor.dim() == 4 and tensor.shape[3] > 3 else tensor

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    whole = sample.arguments(Make(torch.float32, "cpu", "nhwc"))
    for arguments in map(_leaves, (whole, pytree.tree_map_only(Tensor, narrower, whole))):
        results, expected = compiled(*arguments), call(*arguments)
        leaves = tensors_of(arguments)
        ours = torch.autograd.grad(sum(r.sum() for r in results), leaves)
        theirs = torch.autograd.grad(sum(r.sum() for r in expected), leaves)
        for result, same in zip(results, expected, strict=True):
            assert torch.equal(result, same) and result.stride() == same.stride()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ONLY_PUBLIC)
def test_export_keeps_the_operator(op: Operator) -> None:
    for sample in op.samples[:2]:
        arguments = sample.arguments(Make())

        class Module(torch.nn.Module):
            def forward(self, *arguments: Any, options: Any = sample.options) -> Any:
                return op.call(*arguments, **options)

        program = torch.export.export(Module(), arguments)
        assert any(f"fpn_kernels.{op.name}" in str(node.target) for node in program.graph.nodes)
        results = _flat(program.module()(*arguments))
        assert all(map(torch.equal, results, _flat(op.call(*arguments, **sample.options))))


@pytest.mark.parametrize("op", ONLY_PUBLIC)
def test_explain_names_the_backend(op: Operator, target: Target) -> None:
    arguments = op.samples[0].arguments(Make(torch.float32, target.device, "nhwc"))
    with fpn_kernels.use_backend(target.backend):
        explanation = fpn_kernels.explain(op.name, *arguments, **op.samples[0].options)
    assert explanation.backend.startswith((target.backend, "composition"))
