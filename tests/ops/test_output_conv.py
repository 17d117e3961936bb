"""`output_conv`: the paper's width, weights of any strides, and both routes of the backward."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from samples import DTYPES, LAYOUTS, random_map
from targets import Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators import aten

Shape = tuple[int, int, int, int, int]  # batch, input channels, output channels, height, width


def random_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu", layout: str = "nchw") -> list[Tensor]:
    batch, cin, cout, height, width = shape
    feature = random_map((batch, cin, height, width), dtype, device, layout)
    weight = random_map((cout, cin, 3, 3), dtype, device) / (3 * cin**0.5)
    return [feature, weight, random_map((1, cout, 1, 1), dtype, device).flatten()]


@pytest.fixture(autouse=True)
def _has_the_operator(request: pytest.FixtureRequest) -> None:
    if "target" in request.fixturenames:
        request.getfixturevalue("target").require_operator("output_conv")


@pytest.mark.parametrize("layouts", [("nchw", "nchw"), ("nhwc", "nchw"), ("nhwc", "nhwc")], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 256, 256, 5, 7), (2, 16, 16, 38, 57)], ids=["paper's width", "large"])
def test_results_and_gradients(shape: Shape, layouts: tuple[str, str], target: Target) -> None:
    for dtype in target.dtypes():
        inputs = [tensor.requires_grad_() for tensor in random_inputs(shape, dtype, target.device, layouts[0])]
        wide = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
        grad = random_map((shape[0], shape[2], *shape[3:]), dtype, target.device, layouts[1])
        with fpn_kernels.use_backend(target.backend):
            result = fpn_kernels.output_conv(*inputs)
            ours = [result, *torch.autograd.grad(result, inputs, grad)]
        eager = reference.output_conv(*inputs)
        theirs = [eager, *torch.autograd.grad(eager, inputs, grad)]
        exact = oracle.output_conv(*wide)
        true = [exact, *torch.autograd.grad(exact, wide, grad.double().cpu())]
        for mine, other, right in zip(ours, theirs, true, strict=True):
            assert oracle.no_worse_than_eager(mine, other, right), dtype


@pytest.mark.parametrize("strides", ["nhwc", "sliced", "transposed and rotated"])
def test_strided_weights(strides: str, target: Target) -> None:
    feature, _, bias = random_inputs((2, 5, 10, 10, 13), torch.float32, target.device)
    if strides == "transposed and rotated":  # as in the backward
        weight = random_map((5, 10, 3, 3), torch.float32, target.device).flip(2, 3).transpose(0, 1)
    else:
        weight = random_map((10, 5, 3, 3), torch.float32, target.device, strides)
    assert not weight.is_contiguous()
    with target.serves("output_conv"):
        result = fpn_kernels.output_conv(feature, weight, bias)
    assert result.is_contiguous(), "the weight's layout is not the result's"
    eager = reference.output_conv(feature, weight.contiguous(), bias)
    assert oracle.no_worse_than_eager(result, eager, oracle.output_conv(feature, weight, bias))


@pytest.mark.parametrize("limit", [0, 2**60], ids=["large", "small"])
def test_derivatives_of_large_and_small_maps(limit: int, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of a large map takes another route, here at a size that finite differences can afford."""
    monkeypatch.setattr(aten, "_MIN_PIXELS", limit)
    target.require(torch.float64)
    inputs = [x.requires_grad_() for x in random_inputs((2, 3, 2, 4, 3), torch.float64, target.device)]
    with fpn_kernels.use_backend(target.backend):
        for memory_format in (torch.contiguous_format, torch.channels_last):

            def convolve(*tensors: Tensor, memory_format: torch.memory_format = memory_format) -> Tensor:
                return fpn_kernels.output_conv(*tensors, memory_format=memory_format)

            assert torch.autograd.gradcheck(convolve, inputs)
            assert torch.autograd.gradgradcheck(convolve, inputs)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(layout: str, dtype: torch.dtype, target: Target) -> None:
    target.require(dtype)
    for shape in ((2, 6, 5, 7, 8), (1, 6, 5, 48, 50), (1, 33, 1, 1, 40), (3, 2, 17, 50, 1)):
        for memory_format in (torch.preserve_format, torch.contiguous_format, torch.channels_last):
            inputs = random_inputs(shape, dtype, target.device, layout)
            with target.serves("output_conv"):
                result = fpn_kernels.output_conv(*inputs, memory_format=memory_format)
            assert oracle.no_worse_than_eager(result, reference.output_conv(*inputs), oracle.output_conv(*inputs))


def test_the_oracle_is_a_convolution() -> None:
    inputs = random_inputs((2, 5, 10, 10, 13), torch.float64)
    torch.testing.assert_close(oracle.output_conv(*inputs), F.conv2d(*inputs, padding=1))
