"""`upsample_add` and its backward: exact bits, rounding once, and the exact adjoint, at sizes where kernels differ."""

from __future__ import annotations

import oracle
import pytest
import torch
from samples import DTYPES, MERGES, Sizes, random_map
from targets import Target, parameters
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference, resampling

LAYOUTS = ["nchw", "nhwc", "misaligned", "expanded", "sliced-nhwc"]


@pytest.fixture(params=parameters("upsample_add"), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend that has this operator and its backward, on a device."""
    chosen: Target = request.param
    return chosen


def _pair(sizes: Sizes, dtype: torch.dtype, device: str, *layouts: str) -> tuple[Tensor, Tensor]:
    top, fine = layouts or ("nchw", "nchw")
    return (
        random_map((sizes.batch, sizes.channels, *sizes.top), dtype, device, top),
        random_map((sizes.batch, sizes.channels, *sizes.fine), dtype, device, fine),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_nearest_equals_eager_bit_for_bit(mode: str, dtype: torch.dtype, target: Target) -> None:
    target.require(dtype)
    for sizes in target.affordable(MERGES):
        top, lateral = _pair(sizes, dtype, target.device)
        with target.serves("upsample_add"):
            result = fpn_kernels.upsample_add(top, lateral, mode=mode)
        # The sum of two numbers, rounded once, has one right answer: float64 gives the same bits.
        assert torch.equal(result.cpu(), oracle.upsample_add(top, lateral, mode).to(dtype)), sizes
        axes = zip(sizes.top, sizes.fine, strict=True)
        if target.device == "cuda" or all(resampling.indices_agree(i, o, mode, dtype) for i, o in axes):
            assert torch.equal(result, reference.upsample_add(top, lateral, mode=mode)), sizes


@pytest.mark.parametrize("gain", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_the_sum_is_rounded_once(mode: str, dtype: torch.dtype, gain: float, target: Target) -> None:
    target.require(dtype)
    for sizes in target.affordable(MERGES[3:]):
        top, lateral = _pair(sizes, dtype, target.device)
        with target.serves("upsample_add"):
            result = fpn_kernels.upsample_add(top, lateral, mode=mode, gain=gain)
        largest = float(top.abs().max() + lateral.abs().max())
        # A bilinear position is rounded at its own size, and its weight by as much.
        spread = max(sizes.top) if mode == "bilinear" else 1
        oracle.within_rounding(result, oracle.upsample_add(top, lateral, mode, gain), largest * spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_the_backward_is_the_exact_adjoint(mode: str, dtype: torch.dtype, target: Target) -> None:
    """At all sizes with dense maps, and in all layouts of the gradient at one size."""
    target.require(dtype)
    cases = [(sizes, "nchw") for sizes in target.affordable(MERGES)]
    for sizes, layout in (*cases, *((MERGES[8], layout) for layout in LAYOUTS)):
        top, lateral = (x.requires_grad_() for x in _pair(sizes, dtype, target.device))
        grad = random_map(lateral.shape, dtype, target.device, layout)
        result = fpn_kernels.upsample_add(top, lateral, mode=mode, gain=0.5)
        with target.serves("upsample_add_backward"):
            grad_top, grad_lateral = torch.autograd.grad(result, (top, lateral), grad)
        assert torch.equal(grad_lateral, 0.5 * grad)
        terms = oracle.upsample_add_backward(grad.abs(), sizes.top, mode)
        exact = oracle.upsample_add_backward(grad, sizes.top, mode, 0.5)
        oracle.within_rounding(grad_top, exact, terms * max(8, max(sizes.fine)))


@pytest.mark.nightly
@pytest.mark.parametrize("top", ["nchw", "nhwc", "sliced", "sliced-nhwc", "permuted", "expanded", "misaligned"])
@pytest.mark.parametrize("fine", ["nchw", "nhwc", "sliced", "sliced-nhwc", "permuted", "expanded", "misaligned"])
def test_every_pair_of_layouts(fine: str, top: str, target: Target) -> None:
    for mode in resampling.MODES:
        pair = _pair(MERGES[8], torch.float32, target.device, top, fine)
        with target.serves("upsample_add"):
            result = fpn_kernels.upsample_add(*pair, mode=mode)
        oracle.within_rounding(result, oracle.upsample_add(*pair, mode), 8 * float(pair[0].abs().max()))


def test_no_channels(target: Target) -> None:
    top = torch.empty(2, 0, 2, 3, device=target.device, requires_grad=True)
    lateral = torch.empty(2, 0, 4, 6, device=target.device, requires_grad=True)
    with fpn_kernels.use_backend(target.backend):
        fpn_kernels.upsample_add(top, lateral).sum().backward()
    assert top.grad is not None and top.grad.shape == top.shape
