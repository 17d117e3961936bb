"""float32 on a GPU where PyTorch's switch for convolutions allows TF32: as exact as TF32 or as eager."""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from operators import PUBLIC
from samples import Make, of_tensors, random_map, tensors_of
from targets import INTERPRETED, Target, clear_plans, parameters
from torch import Tensor

import fpn_kernels

if INTERPRETED:
    pytest.skip("the interpreter is on: it has no tensor cores", allow_module_level=True)

pytestmark = pytest.mark.gpu

# An operand that is rounded to TF32 has an error of at most 2**-11 of itself; with both of them rounded, a sum of
# products of random signs stays below that, relatively.
DUE = 2.0**-11


@pytest.fixture(params=parameters("lateral_connection", device="cuda"), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend that has convolutions, on a GPU."""
    chosen: Target = request.param
    return chosen


@pytest.fixture
def tf32() -> Iterator[None]:
    switch, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    switch.fp32_precision = "tf32"
    clear_plans()
    yield
    switch.fp32_precision = before


def _check(results: list[Tensor], eager: list[Tensor], exact: list[Tensor], roundings: int = 1) -> None:
    for ours, theirs, wanted in zip(results, eager, exact, strict=True):
        assert oracle.error(ours, wanted) <= max(1.1 * oracle.error(theirs, wanted), roundings * DUE)


def _with_gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(results, leaves, [torch.cos(torch.arange(r.numel()).to(r)).view_as(r) for r in results])
    return [*(result.detach() for result in results), *grads]


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["lateral_connection", "output_conv", "output_conv_levels", "top_down_pathway"])
def test_results_and_gradients(name: str, layout: str, target: Target) -> None:
    op = next(op for op in PUBLIC if op.name == name)
    for sample in op.samples:
        arguments = sample.arguments(Make(torch.float32, target.device, layout))
        ours = [tensor.requires_grad_() for tensor in tensors_of(arguments)]
        wide = [tensor.detach().double().cpu().requires_grad_() for tensor in ours]
        with fpn_kernels.use_backend(target.backend):
            results = _with_gradients(of_tensors(op.call, arguments, sample.options)(*ours), ours)
        eager = _with_gradients(of_tensors(op.eager, arguments, sample.options)(*ours), ours)
        exact = _with_gradients(of_tensors(op.exact, arguments, sample.options)(*wide), wide)
        _check(results, eager, exact, roundings=3)


def test_the_switch_is_obeyed_from_call_to_call(target: Target) -> None:
    """The same call under the other setting is another call."""
    feature, weight = random_map((1, 64, 40, 48), torch.float32, layout="nhwc"), torch.randn(64, 64) / 8
    exact = oracle.lateral_connection(feature, weight)
    errors = {}
    with fpn_kernels.use_backend(target.backend):
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            try:
                result = fpn_kernels.lateral_connection(feature.to(target.device), weight.to(target.device))
            finally:
                torch.backends.cudnn.conv.fp32_precision = "ieee"
            errors[precision] = oracle.error(result, exact)
    assert errors["ieee"] <= 1e-6 and errors["tf32"] <= DUE
    if target.backend == "triton":
        assert errors["tf32"] > 1e-5, "TF32 was allowed and not taken"
