"""In which layout and dtype, and by which gradient, the 3x3 convolution is computed on a CPU: as it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from levels import PORTABLE, limited
from samples import random_map
from test_output_conv import CASES, DTYPES, Case, random_inputs
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fpn_kernels
from fpn_kernels import functional, reference
from fpn_kernels.backends import convolution, native

compiled = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")


class Convolutions(TorchDispatchMode):
    """Records the dtype and the layout in which PyTorch's own convolution was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.dtype, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.calls.append((args[0].dtype, args[0].is_contiguous(memory_format=torch.channels_last)))
        return func(*args, **(kwargs or {}))


@compiled
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("size", "large"), [((8, 9), False), ((45, 47), True)], ids=["few pixels", "many pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_bfloat16_maps_are_multiplied_in_nhwc(
    dtype: torch.dtype, size: tuple[int, int], large: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "onednn_multiplies", lambda dtype: True)
    inputs = random_inputs(Case(1, 8, 8, size), dtype, "cpu", layout)
    # By PyTorch's own convolution: the library's is asked first.
    with limited(PORTABLE), Convolutions() as convolutions:
        native.output_conv(*inputs, None)
    nhwc = layout == "nhwc" or (large and dtype == torch.bfloat16)
    assert convolutions.calls == [(dtype, nhwc)]


@pytest.fixture(params=[False, True], ids=["without 16 bits", "with 16 bits"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A CPU with instructions for products of 16 bits and one without, as far as the choice goes.

    Neither has vectors, where the library's own convolution would be asked first.
    """
    monkeypatch.setattr(convolution, "onednn_multiplies", lambda dtype: request.param)
    with limited(PORTABLE):
        yield request.param


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_16_bits_are_multiplied_in_float32_where_that_is_faster(
    layout: str, dtype: torch.dtype, multiplies: bool
) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(CASES[1], dtype, "cpu", layout)]
    with torch.no_grad(), Convolutions() as convolutions:
        native.output_conv(*inputs, None)
    with fpn_kernels.use_backend("native"):
        result = fpn_kernels.output_conv(*inputs)
    assert [used for used, _ in convolutions.calls] == [dtype if multiplies else torch.float32]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = oracle.output_conv(*exact_inputs)
    assert oracle.no_worse_than_eager(result, reference.output_conv(*inputs), exact)
    grad = torch.randn_like(result)
    theirs = torch.autograd.grad(reference.output_conv(*inputs), inputs, grad)
    true = torch.autograd.grad(exact, exact_inputs, grad.double())
    for ours, eager, wanted in zip(torch.autograd.grad(result, inputs, grad), theirs, true, strict=True):
        assert oracle.no_worse_than_eager(ours, eager, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_to_ask_for(dtype: torch.dtype) -> None:
    large, small = torch.empty(1, 1, 64, 64, dtype=dtype), torch.empty(1, 1, 8, 8, dtype=dtype)
    nhwc = dtype == torch.bfloat16 and convolution.onednn_multiplies(dtype) and not native.load_error()
    wanted = torch.channels_last if nhwc else torch.preserve_format
    assert functional.output_conv_format(large) == wanted
    assert functional.output_conv_format(small) == torch.preserve_format
    with fpn_kernels.use_backend("eager"):
        assert functional.output_conv_format(large) == torch.preserve_format
    assert functional.output_conv_format(torch.empty_like(large, device="meta")) == torch.preserve_format


def test_the_layout_to_ask_for_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where autograd records the convolution, one layout throughout."""
    monkeypatch.setattr(functional, "_output_conv_format", lambda device_type, dtype: torch.channels_last)
    with FakeTensorMode():
        feature = torch.empty(1, 1, 64, 64, device="cuda:0")
    assert functional.output_conv_format(feature) == torch.channels_last
    assert functional.output_conv_format(feature, recorded=True) == torch.preserve_format
    assert functional.output_conv_format(torch.empty(1, 1, 64, 64), recorded=True) == torch.channels_last


@compiled
def test_the_layout_to_ask_for_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "onednn_multiplies", lambda dtype: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.output_conv_format(torch.empty(1, 1, 64, 64)) == torch.channels_last
        assert functional.output_conv_format(torch.empty(1, 1, 64, 64, dtype=torch.float64)) == torch.preserve_format


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplies", [False, True], ids=["without bfloat16", "with bfloat16"])
def test_where_the_adjoint_is_faster(
    multiplies: bool, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what was measured: see `convolution.adjoint_is_faster`."""
    monkeypatch.setattr(convolution, "onednn_multiplies", lambda dtype: multiplies)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    sizes = {"few": (45, 45), "more": (46, 45), "many": (91, 91)}  # 2,025, 2,070 and 8,281 pixels
    for by_tiles in (False, True):
        pays = {
            name: convolution.adjoint_is_faster(random_map((1, 2, *size), dtype, layout=layout), by_tiles)
            for name, size in sizes.items()
        }
        if dtype != torch.bfloat16 or by_tiles or not multiplies:
            assert pays == {"few": False, "more": True, "many": True}
        else:
            assert pays == {"few": False, "more": False, "many": layout == "nchw"}
    assert not convolution.adjoint_is_faster(torch.empty(1, 2, 91, 91, dtype=dtype, device="meta"), True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    in_float32 = dtype == torch.float32 or (dtype != torch.float64 and not multiplies)
    small = torch.empty(1, 2, 16, 16, dtype=dtype)
    assert convolution.adjoint_is_faster(small, False) == in_float32
    assert not convolution.adjoint_is_faster(small[..., :15], False)
