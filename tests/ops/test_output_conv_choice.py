"""The CPU computes a 3x3 convolution in another layout or dtype where that is faster: the results stay as exact."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from levels import PORTABLE, limited
from targets import needs_library
from test_output_conv import random_inputs
from torch._subclasses import FakeTensorMode

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators import aten
from fpn_kernels.operators.output_conv import layout


@needs_library
@pytest.mark.parametrize("size", [(8, 9), (45, 47)], ids=["small", "large"])
@pytest.mark.parametrize("by_onednn", [False, True], ids=["in float32", "in 16 bits by oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_with_and_without_instructions_for_them(
    dtype: torch.dtype, by_onednn: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PyTorch's own convolution: without vectors the library has none."""
    monkeypatch.setattr(aten, "onednn_multiplies", lambda dtype: by_onednn)
    for given in ("nchw", "nhwc"):
        inputs = [t.requires_grad_() for t in random_inputs((1, 8, 8, *size), dtype, "cpu", given)]
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        with limited(PORTABLE), fpn_kernels.use_backend("native"):
            result = fpn_kernels.output_conv(*inputs)
            grad = torch.randn_like(result)
            ours = [result, *torch.autograd.grad(result, inputs, grad)]
        eager, exact = reference.output_conv(*inputs), oracle.output_conv(*wide)
        theirs = [eager, *torch.autograd.grad(eager, inputs, grad)]
        true = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        for mine, other, right in zip(ours, theirs, true, strict=True):
            assert oracle.no_worse_than_eager(mine, other, right)


def test_the_format_of_a_merged_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps, eager, and maps that autograd records on a GPU keep their layout."""
    large, small = torch.empty(1, 1, 64, 64), torch.empty(1, 1, 8, 8)
    with fpn_kernels.use_backend("eager"):
        assert layout.best_format(large) == torch.preserve_format
    monkeypatch.setattr(layout, "_best_format_for", lambda device_type, dtype: torch.channels_last)
    assert layout.best_format(small) == torch.preserve_format
    assert layout.best_format(large, recorded=True) == torch.channels_last
    with FakeTensorMode():
        feature: Any = torch.empty(1, 1, 64, 64, device="cuda:0")
    assert layout.best_format(feature) == torch.channels_last
    assert layout.best_format(feature, recorded=True) == torch.preserve_format


@needs_library
def test_the_format_under_autocast_is_that_of_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "onednn_multiplies", lambda dtype: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layout.best_format(torch.empty(1, 1, 64, 64)) == torch.channels_last
        assert layout.best_format(torch.empty(1, 1, 64, 64, dtype=torch.float64)) == torch.preserve_format
