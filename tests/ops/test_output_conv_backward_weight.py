"""`output_conv_backward_weight`: the paper's width, without a bias, and the layout of a kept gradient."""

from __future__ import annotations

import oracle
import pytest
import torch
from operators import OPERATORS
from samples import random_map
from targets import Target

import fpn_kernels

OPERATOR = torch.ops.fpn_kernels.output_conv_backward_weight.default
exact = oracle.output_conv_backward_weight
(EAGER,) = (operator.eager for operator in OPERATORS if operator.name == "output_conv_backward_weight")


@pytest.mark.parametrize("layouts", [("nchw", "nchw"), ("nchw", "nhwc"), ("nhwc", "nhwc")], ids="-".join)
def test_the_papers_width_with_a_bias_and_without(layouts: tuple[str, str], target: Target) -> None:
    for dtype in target.dtypes():
        grad, feature = (random_map((1, 256, 5, 7), dtype, target.device, layout) for layout in layouts)
        with fpn_kernels.use_backend(target.backend):
            ours = OPERATOR(grad, feature)
            alone, nothing = OPERATOR(grad, feature, wants_bias=False)
        for result, eager, right in zip(ours, EAGER(grad, feature), exact(grad, feature), strict=True):
            assert oracle.no_worse_than_eager(result, eager, right), dtype
        assert torch.equal(alone, ours[0]) and nothing.shape == (0,) and nothing.dtype == dtype


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_has_the_layout_of_the_weight(dtype: torch.dtype, layout: str, target: Target) -> None:
    """A gradient in another layout would be copied when it is kept."""
    grad, feature = (random_map((2, 16, 9, 14), dtype, target.device, "nhwc") for _ in range(2))
    weight = random_map((16, 16, 3, 3), dtype, target.device, layout).requires_grad_()
    with fpn_kernels.use_backend(target.backend):
        (of_weight,) = torch.autograd.grad(fpn_kernels.output_conv(feature, weight), weight, grad)
    assert of_weight.stride() == weight.stride()
