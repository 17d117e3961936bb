"""Whose autograd records an `output_conv`: PyTorch's own where eager serves it, and where a map is small."""

from __future__ import annotations

import importlib

import oracle
import pytest
import torch
from samples import random_map
from torch import Tensor

import fpn_kernels
from fpn_kernels import functional
from fpn_kernels.backends import convolution, native, selection

FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last)


def _inputs(size: tuple[int, int], cin: int, cout: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    feature, weight = random_map((2, cin, *size), dtype), random_map((cout, cin, 3, 3), dtype) / (3 * cin**0.5)
    return [feature.requires_grad_(), weight.requires_grad_(), random_map((1, cout, 1, 1), dtype).flatten()]


@pytest.fixture(autouse=True)
def _as_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both gradients are ATen's, whatever the map."""
    monkeypatch.setattr(convolution, "gradients_are_atens", lambda device_type: True)


def _node(inputs: list[Tensor]) -> tuple[str, list[tuple[str, str]]]:
    with selection.record_calls() as calls:
        result = fpn_kernels.output_conv(*inputs)
    return type(result.grad_fn).__name__, calls


def test_pytorchs_own_autograd_records_its_own_convolution() -> None:
    inputs = [tensor.requires_grad_() for tensor in _inputs((10, 13), 5, 10)]
    for asked in FORMATS:
        with fpn_kernels.use_backend("eager"), selection.record_calls() as calls:
            result = fpn_kernels.output_conv(*inputs, memory_format=asked)
            again = fpn_kernels.output_conv(*inputs, memory_format=asked)
        assert calls == [("output_conv", "eager")] * 2
        assert type(result.grad_fn).__name__ in ("ConvolutionBackward0", "CloneBackward0")
        assert torch.equal(result, again)
        wanted = torch.channels_last if asked == torch.channels_last else torch.contiguous_format
        assert result.is_contiguous(memory_format=wanted)
    ours = torch.autograd.grad(result, inputs, torch.ones_like(result))
    theirs = torch.autograd.grad(oracle.output_conv(*inputs), inputs, torch.ones_like(result))
    for gradient, exact in zip(ours, theirs, strict=True):
        assert oracle.error(gradient, exact) <= 1e-13

    def convolve(*tensors: Tensor) -> Tensor:
        return fpn_kernels.output_conv(*tensors)

    small = [tensor.requires_grad_() for tensor in _inputs((3, 2), 2, 2)]
    with fpn_kernels.use_backend("eager"):
        assert torch.autograd.gradcheck(convolve, small) and torch.autograd.gradgradcheck(convolve, small)


@pytest.mark.parametrize("wanted", [(True, False, True), (False, True, True), (False, False, True)], ids=str)
def test_it_does_not_where_it_would_keep_what_one_gradient_does_not_need(wanted: tuple[bool, ...]) -> None:
    inputs = [tensor.detach() for tensor in _inputs((8, 12), 32, 64)]
    for tensor, wants in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(wants)
    with fpn_kernels.use_backend("eager"):
        assert _node(inputs)[0] == "output_convBackward"


@pytest.mark.skipif(native.load_error() is not None, reason="another backend than eager")
def test_it_does_not_where_another_backend_serves_a_large_map(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs((8, 12), 32, 64, torch.float32)
    # On a small map PyTorch's own node is worth more to the host than the kernel is to the device.
    assert _node(inputs) == ("ConvolutionBackward0", [("output_conv", "eager")])
    with fpn_kernels.use_backend("native"):
        assert _node(inputs) == ("output_convBackward", [("output_conv", "native")])
    monkeypatch.setattr(importlib.import_module("fpn_kernels.operators.output_conv"), "_MANY_PIXELS", 2 * 8 * 12)
    assert _node(inputs) == ("output_convBackward", [("output_conv", "native")])
    with torch.no_grad():
        assert _node(inputs)[1] == [("output_conv", "native")]


@pytest.mark.skipif(native.load_error() is not None, reason="another backend than eager")
def test_each_level_of_a_pyramid_has_the_node_that_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fpn_kernels.operators.output_conv"), "_MANY_PIXELS", 2 * 8 * 12)
    inputs = [_inputs(size, 32, 64, torch.float32) for size in ((8, 12), (4, 6), (2, 3))]
    inputs[2][0] = inputs[2][0].detach()
    groups = [list(group) for group in zip(*inputs, strict=True)]
    for _ in range(2):  # prepared, and remembered
        with selection.record_calls() as calls:
            results = functional.output_conv_levels(*groups)
        nodes = [type(result.grad_fn).__name__ for result in results]
        assert nodes == ["output_convBackward", "ConvolutionBackward0", "output_convBackward"]
        assert [backend for _, backend in calls] == ["native", "eager", "native"]
        for result, level in zip(results, inputs, strict=True):
            assert torch.equal(result, fpn_kernels.output_conv(*level))
