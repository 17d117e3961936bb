"""`output_conv`, which PyTorch's own convolution computes."""

from __future__ import annotations

import pytest
import torch
from samples import random_map

import fpn_kernels
from fpn_kernels import reference


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(has_bias: bool, dtype: torch.dtype, layout: str) -> None:
    feature = random_map((2, 5, 7, 9), dtype, layout=layout)
    weight = random_map((10, 5, 3, 3), dtype)
    bias = random_map((1, 10, 1, 1), dtype).flatten() if has_bias else None
    result = fpn_kernels.output_conv(feature, weight, bias)
    assert torch.equal(result, reference.output_conv(feature, weight, bias))


def test_gradcheck() -> None:
    inputs = [random_map(shape, torch.float64).requires_grad_() for shape in [(1, 2, 4, 3), (3, 2, 3, 3)]]
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fpn_kernels.output_conv, (*inputs, bias))


def test_autocast_casts_as_a_convolution_does() -> None:
    feature, weight = random_map((1, 2, 4, 4), torch.bfloat16), random_map((3, 2, 3, 3), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fpn_kernels.output_conv(feature, weight).dtype == torch.bfloat16


BAD = {
    "feature": (lambda f, w, b: (None, w, b), TypeError, "feature: expected a tensor, got NoneType"),
    "weight": (lambda f, w, b: (f, [1], b), TypeError, "weight: expected a tensor, got list"),
    "bias": (lambda f, w, b: (f, w, 1), TypeError, "bias: expected a tensor or None, got int"),
    "rank": (lambda f, w, b: (f[0], w, b), ValueError, "feature: expected 4 dimensions"),
    "a 1x1 weight": (lambda f, w, b: (f, w[..., :1, :1], b), ValueError, r"weight: .*\[Cout, 2, 3, 3\], got \[4, 2, 1"),
    "a flat weight": (lambda f, w, b: (f, w[..., 0, 0], b), ValueError, r"weight: .*got \[4, 2\]"),
    "channels": (lambda f, w, b: (f[:, :1], w, b), ValueError, r"weight: .*\[Cout, 1, 3, 3\]"),
    "size of bias": (lambda f, w, b: (f, w, b[1:]), ValueError, r"bias: .*\[4\], got \[3\]"),
    "dtype": (lambda f, w, b: (f.double(), w, b), TypeError, "weight: expected the dtype of feature"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        fpn_kernels.output_conv(*make(torch.randn(1, 2, 4, 4), torch.randn(4, 2, 3, 3), torch.randn(4)))
