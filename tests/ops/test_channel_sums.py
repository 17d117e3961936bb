"""`channel_sums`: the sum of each channel over all pixels, on every backend that is here."""

from __future__ import annotations

import oracle
import pytest
import torch
from samples import LAYOUTS, random_map
from targets import Target, parameters

import fpn_kernels
from fpn_kernels.backends.triton import eligibility

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

SHAPES = [
    (2, 16, 8, 12),  # whole vectors of channels
    (1, 256, 5, 7),  # the paper's width
    (3, 257, 3, 4),  # a tail of one channel
    (1, 1, 19, 29),  # one channel
    (2, 5, 1, 1),  # one pixel
    (1, 10, 38, 57),  # several programs, the last of them with less
]


def _sums(source: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.fpn_kernels.channel_sums(source)
    return result


@pytest.fixture(params=parameters(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend that has the operator; eager's may stand in for the layouts that Triton leaves to it."""
    chosen: Target = request.param
    if chosen.backend == "native":
        pytest.skip("native has no implementation of channel_sums")
    return chosen


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, layout: str, target: Target) -> None:
    target.require(dtype)
    source = random_map(shape, dtype, target.device, layout)
    served = target.backend == "triton" and eligibility.channel_sums(source) is None
    with fpn_kernels.use_backend(target.backend), fpn_kernels.backends.selection.record_calls() as calls:
        result, again = _sums(source), _sums(source)
    assert calls == [("channel_sums", "triton" if served else "eager")] * 2
    assert (result.shape, result.dtype) == (shape[1:2], dtype) and torch.equal(result, again)
    wide = source.double().cpu()
    pixels = shape[0] * shape[2] * shape[3]
    oracle.within_rounding(result, wide.sum((0, 2, 3)), wide.abs().sum((0, 2, 3)) * (1 + pixels / 64))


def test_nothing(target: Target) -> None:
    with fpn_kernels.use_backend(target.backend):
        assert torch.equal(_sums(torch.empty(0, 3, 4, 4, device=target.device)).cpu(), torch.zeros(3))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
def test_opcheck(layout: str, target: Target) -> None:
    for requires_grad in (False, True):
        source = random_map(SHAPES[0], torch.float32, target.device, layout).requires_grad_(requires_grad)
        target.opcheck(torch.ops.fpn_kernels.channel_sums.default, (source,), rtol=1e-4, atol=1e-5)


def test_gradcheck(target: Target) -> None:
    target.require(torch.float64)
    source = random_map((2, 3, 4, 2), torch.float64, target.device).requires_grad_()
    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(lambda s: _sums(s) ** 2, [source])
        assert torch.autograd.gradgradcheck(lambda s: _sums(s) ** 2, [source])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (torch.ones(2, 3, 4), ValueError, "source: expected 4 dimensions"),
        (torch.ones(1, 2, 3, 4).int(), TypeError, "source: .*got torch.int32"),
    ],
    ids=["rank", "dtype"],
)
def test_bad_input_is_named(source: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _sums(source)
