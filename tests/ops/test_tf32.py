"""float32 on a GPU where PyTorch's switch for convolutions allows TF32: as exact as TF32, or as eager; and no less."""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from samples import random_map
from targets import INTERPRETED, Target, parameters
from torch import Tensor

import fpn_kernels
from fpn_kernels import functional, reference
from fpn_kernels.backends import serving

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
    serving.forget()
    yield
    switch.fp32_precision = before


def _check(results: list[Tensor], eager: list[Tensor], exact: list[Tensor], roundings: int = 1) -> None:
    for ours, theirs, wanted in zip(results, eager, exact, strict=True):
        assert oracle.error(ours, wanted) <= max(1.1 * oracle.error(theirs, wanted), roundings * DUE)


def _with_gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(results, leaves, [torch.cos(torch.arange(r.numel()).to(r)).view_as(r) for r in results])
    return [*(result.detach() for result in results), *grads]


def _leaves(*tensors: Tensor, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """On the device in float32, and on the CPU in float64."""
    ours = [t.detach().to(device).requires_grad_() for t in tensors]
    return ours, [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("channels", "size"), [((40, 72), (25, 38)), ((64, 64), (40, 64)), ((5, 10), (10, 13))])
def test_lateral_connection(channels: tuple[int, int], size: tuple[int, int], layout: str, target: Target) -> None:
    (cin, cout), (height, width) = channels, size
    ours, exact = _leaves(
        random_map((2, cin, height, width), torch.float32, layout=layout),
        torch.randn(cout, cin) / cin**0.5,
        torch.randn(cout),
        random_map((2, cout, height // 2, width // 2), torch.float32, layout=layout),
        device=target.device,
    )
    with fpn_kernels.use_backend(target.backend):
        results = _with_gradients([fpn_kernels.lateral_connection(*ours)], ours)
    eager = _with_gradients([reference.lateral_connection(*ours)], ours)
    _check(results, eager, _with_gradients([oracle.lateral_connection(*exact)], exact))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("cin", "cout"), [(64, 96), (24, 40), (16, 10)])
def test_output_conv(cin: int, cout: int, levels: int, target: Target) -> None:
    sizes = [(40, 33), (20, 17), (5, 4)][:levels]
    tensors = [random_map((2, cin, *size), torch.float32, layout="nhwc") for size in sizes]
    tensors += [torch.randn(cout, cin, 3, 3) / (9 * cin) ** 0.5 for _ in sizes] + [torch.randn(cout) for _ in sizes]
    ours, exact = _leaves(*tensors, device=target.device)
    groups = ours[:levels], ours[levels : 2 * levels], ours[2 * levels :]
    with fpn_kernels.use_backend(target.backend):
        results = _with_gradients(list(functional.output_conv_levels(*groups)), ours)
    eager = _with_gradients([reference.output_conv(*level) for level in zip(*groups, strict=True)], ours)
    wanted = [oracle.output_conv(*exact[level::levels]) for level in range(levels)]
    _check(results, eager, _with_gradients(wanted, exact))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_top_down_pathway(layout: str, target: Target) -> None:
    sizes, channels, width = [(40, 64), (20, 32), (10, 16)], (32, 64, 128), 48
    tensors = [random_map((1, c, *s), torch.float32, layout=layout) for c, s in zip(channels, sizes, strict=True)]
    tensors += [torch.randn(width, c) / c**0.5 for c in channels] + [torch.randn(width) for _ in channels]
    ours, exact = _leaves(*tensors, device=target.device)
    with fpn_kernels.use_backend(target.backend):
        merged = fpn_kernels.top_down_pathway(ours[:3], ours[3:6], ours[6:])
    results = _with_gradients(list(merged), ours)
    eager = _with_gradients(list(reference.top_down_pathway(ours[:3], ours[3:6], ours[6:])), ours)
    wanted: list[Tensor] = []
    for level in (2, 1, 0):
        top = wanted[-1] if wanted else None
        wanted.append(oracle.lateral_connection(exact[level], exact[3 + level], exact[6 + level], top))
    _check(results, eager, _with_gradients(wanted[::-1], exact), roundings=3)


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
