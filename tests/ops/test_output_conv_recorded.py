"""PyTorch's own autograd records an `output_conv` where eager serves it, as on a GPU: derivatives and memory."""

from __future__ import annotations

import oracle
import pytest
import torch
from test_output_conv import random_inputs
from torch import Tensor

import fpn_kernels
from fpn_kernels import functional
from fpn_kernels.operators import aten


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both gradients are ATen's, for a map of any size."""
    monkeypatch.setattr(aten, "gradients_are_atens", lambda device_type: True)


def test_derivatives() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs((2, 5, 10, 10, 13), torch.float64)]
    small = [tensor.requires_grad_() for tensor in random_inputs((2, 2, 2, 3, 2), torch.float64)]
    exact = oracle.output_conv(*inputs)
    true = torch.autograd.grad(exact, inputs, torch.ones_like(exact))
    with fpn_kernels.use_backend("eager"):
        for memory_format in (torch.preserve_format, torch.contiguous_format, torch.channels_last):
            result = fpn_kernels.output_conv(*inputs, memory_format=memory_format)
            assert result.is_contiguous(memory_format=memory_format) or memory_format == torch.preserve_format
            for gradient, right in zip(torch.autograd.grad(result, inputs, torch.ones_like(result)), true, strict=True):
                assert oracle.error(gradient, right) <= 1e-13
        assert torch.autograd.gradcheck(fpn_kernels.output_conv, small)
        assert torch.autograd.gradgradcheck(fpn_kernels.output_conv, small)


@pytest.mark.parametrize("frozen", [0, 1], ids=["feature", "weight"])
def test_a_frozen_input_keeps_nothing_alive(frozen: int) -> None:
    inputs = random_inputs((2, 32, 64, 8, 12), torch.float32)
    inputs[1 - frozen].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):  # type: ignore[misc]
        fpn_kernels.output_conv(*inputs)
    assert [tensor.data_ptr() for tensor in saved if tensor is not None] == [inputs[frozen].data_ptr()]


def test_levels_have_the_bits_that_each_has_alone() -> None:
    """One level without a gradient among others, twice: the second call takes its plan from the cache."""
    levels = [random_inputs((2, 32, 64, *size), torch.float32) for size in ((8, 12), (4, 6), (2, 3))]
    for feature, weight, _ in levels[:2]:
        feature.requires_grad_(), weight.requires_grad_()
    for _ in range(2):
        results = functional.output_conv_levels(*[list(group) for group in zip(*levels, strict=True)])
        assert [result.requires_grad for result in results] == [True, True, False]
        for result, level in zip(results, levels, strict=True):
            assert torch.equal(result, fpn_kernels.output_conv(*level))
