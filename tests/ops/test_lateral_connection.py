"""`lateral_connection`: channels and sizes at which tiles have tails, and weights of any strides."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import torch
from samples import DTYPES, random_map
from targets import INTERPRETED, Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference, resampling


class Case(NamedTuple):
    batch: int
    cin: int
    cout: int
    top: tuple[int, int]
    fine: tuple[int, int]
    mode: str

    def __str__(self) -> str:
        return f"{self.batch}x{self.cin}-to-{self.cout}-{self.fine[0]}x{self.fine[1]}-{self.mode}"


CASES = [
    Case(1, 257, 3, (3, 3), (5, 6), "bilinear"),  # a tail of one input channel
    Case(1, 1, 257, (1, 1), (4, 5), "nearest"),  # one input channel, a 1 x 1 top, a tail of one output channel
    Case(1, 8, 16, (6, 6), (4, 3), "nearest-exact"),  # a top larger than the feature
    Case(1, 10, 1, (19, 29), (38, 57), "nearest"),  # C5 to C4 of a 600 x 900 image, one output channel
    Case(1, 256, 256, (4, 5), (8, 10), "nearest"),  # the paper's width
    Case(2, 12, 20, (15, 9), (29, 17), "nearest-exact"),  # uneven float32 indices
    Case(2, 5, 10, (5, 7), (10, 13), "bilinear"),  # tails in every dimension
][: 3 if INTERPRETED else None]


def _inputs(case: Case, dtype: torch.dtype, device: str, layout: str) -> list[Tensor]:
    feature = random_map((case.batch, case.cin, *case.fine), dtype, device, layout)
    weight = random_map((case.cout, case.cin, 1, 1), dtype, device) / case.cin**0.5
    bias = random_map((1, case.cout, 1, 1), dtype, device).flatten()
    top = random_map((case.batch, case.cout, *case.top), dtype, device, layout)
    return [tensor.requires_grad_() for tensor in (feature, weight, bias, top)]


def _eager_reads_other_pixels(case: Case, dtype: torch.dtype) -> bool:
    axes = zip(case.top, case.fine, strict=True)
    return case.mode != "bilinear" and not all(resampling.indices_agree(i, o, case.mode, dtype) for i, o in axes)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case: Case, layout: str, target: Target) -> None:
    for dtype in target.dtypes():
        inputs, options = _inputs(case, dtype, target.device, layout), {"mode": case.mode, "gain": 0.7}
        wide = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
        upstream = random_map((case.batch, case.cout, *case.fine), dtype, target.device, layout)
        with target.serves("lateral_connection", "merge_backward"):
            result = fpn_kernels.lateral_connection(*inputs, **options)
            ours = [result, *torch.autograd.grad(result, inputs, upstream)]
        eager = reference.lateral_connection(*inputs, **options)
        theirs = [eager, *torch.autograd.grad(eager, inputs, upstream)]
        exact = oracle.lateral_connection(*wide, **options)
        true = [exact, *torch.autograd.grad(exact, wide, upstream.double().cpu())]
        for place, (mine, other, right) in enumerate(zip(ours, theirs, true, strict=True)):
            if place in (0, 4) and _eager_reads_other_pixels(case, dtype):
                assert oracle.error(mine, right) <= 4 * oracle.rounding(dtype)
            else:
                of = dtype if place in (2, 3) else None
                assert oracle.no_worse_than_eager(mine, other, right, sum_over_pixels_of=of), (dtype, place)


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_strided_weights(strides: str, target: Target) -> None:
    feature, weight, bias, top = (x.detach() for x in _inputs(CASES[2], torch.float32, target.device, "nchw"))
    spaced = torch.zeros(16, 16, 1, 1, device=target.device)
    spaced[:, ::2] = weight
    strided = spaced[:, ::2] if strides == "sliced" else weight.flatten(1).t().contiguous().t()
    assert torch.equal(strided.flatten(1), weight.flatten(1)) and not strided.is_contiguous()
    with target.serves("lateral_connection"):
        result = fpn_kernels.lateral_connection(feature, strided, bias, top)
    eager = reference.lateral_connection(feature, weight, bias, top)
    assert oracle.no_worse_than_eager(result, eager, oracle.lateral_connection(feature, weight, bias, top))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "memory_format", [torch.preserve_format, torch.contiguous_format, torch.channels_last], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_every_mode_dtype_and_layout(
    mode: str, dtype: torch.dtype, memory_format: torch.memory_format, target: Target
) -> None:
    target.require(dtype)
    layouts = ["nchw", "nhwc", "sliced", "sliced-nhwc", "permuted", "expanded", "misaligned"]
    for case in CASES:
        for layout in layouts:
            inputs = [x.detach() for x in _inputs(case._replace(mode=mode), dtype, target.device, layout)]
            with target.serves("lateral_connection"):
                result = fpn_kernels.lateral_connection(*inputs, mode=mode, memory_format=memory_format)
            if _eager_reads_other_pixels(case._replace(mode=mode), dtype):
                continue
            eager = reference.lateral_connection(*inputs, mode=mode)
            assert oracle.no_worse_than_eager(result, eager, oracle.lateral_connection(*inputs, mode=mode))
