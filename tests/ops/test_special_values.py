"""NaN, infinities, signed zeros, subnormals and overflow: each operator passes them through as eager does.

Exceptions, where eager differs from itself:

- a 16-bit sum that is scaled (`gain`), or a 16-bit bilinear value, overflows to infinity in eager before it is scaled
  or added; here only the result is rounded, so what fits into the dtype is finite;
- instructions that multiply bfloat16 take subnormal numbers as zero, in eager's convolutions as well as here (here
  the top's too, where they add it);
- a convolution by Winograd's filtering mixes the pixels of a tile: an infinite or NaN pixel may show in all of the
  tile, in eager's (float32 on many CPUs) as well as here, but no result that should not be finite is.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from levels import LEVELS, limited
from samples import DTYPES
from targets import INTERPRETED, Target, needs_library, record_calls
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference, resampling

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Under the interpreter one layout: it takes a millisecond per instruction.
LAYOUTS = dict(list(FORMATS.items())[-1:]) if INTERPRETED else FORMATS
NUMPY = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # under Triton's interpreter

pytestmark = NUMPY


def _special(dtype: torch.dtype, target: Target) -> list[float]:
    finfo = torch.finfo(dtype)
    large = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, finfo.max, -finfo.max]
    if (target.label, dtype) == ("triton-interpreter", torch.bfloat16):
        return large  # it rounds subnormal results to zero, where a GPU's instructions do not
    return [*large, finfo.smallest_normal, finfo.smallest_normal * finfo.eps, -finfo.smallest_normal / 2]


def _every_pair(dtype: torch.dtype, target: Target, layout: str) -> tuple[Tensor, ...]:
    """A top of each special value in each of 16 channels, and laterals that meet each with each."""
    values = torch.tensor(_special(dtype, target), dtype=torch.float64).to(dtype)
    count = len(values)
    top = values.view(1, 1, 1, count).expand(1, 16, 3, count)
    lateral = values.view(1, 1, count, 1).expand(1, 16, count, 2 * count)
    return tuple(x.to(target.device).contiguous(memory_format=FORMATS[layout]) for x in (top, lateral))


def same(result: Tensor, expected: Tensor) -> None:
    """Bit for bit, the sign of zeros included; a NaN is a NaN."""
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)
    zeros = (expected == 0) & (result == 0)
    assert torch.equal(result.signbit() & zeros, expected.signbit() & zeros), "the sign of a zero"


# ------------------------------------------------------------------------------------------------ upsample_add


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_a_merge_of_any_two_values(mode: str, dtype: torch.dtype, layout: str, target: Target) -> None:
    target.require(dtype)
    top, lateral = _every_pair(dtype, target, layout)
    with target.serves("upsample_add"):
        result = fpn_kernels.upsample_add(top, lateral, mode=mode)
    same(result, reference.upsample_add(top, lateral, mode=mode))
    assert result.isnan().any() and result.isinf().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scaled_merge(dtype: torch.dtype, layout: str, target: Target) -> None:
    """As eager's sum in the wider dtype, rounded once: 16-bit sums that fit after scaling do not overflow before."""
    target.require(dtype)
    top, lateral = _every_pair(dtype, target, layout)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    with target.serves("upsample_add"):
        result = fpn_kernels.upsample_add(top, lateral, gain=0.5)
    expected = reference.upsample_add(top.to(wide), lateral.to(wide), gain=0.5)
    if dtype == torch.bfloat16:
        # Its largest number and itself are beyond float32: eager's backend scales each before, the others the sum.
        beyond = expected.isinf() & top.repeat_interleave(2, 3)[:, :, :1].isfinite() & lateral.isfinite()
        assert beyond.any() and not result[beyond].isnan().any()
        result, expected = (x.to(dtype).masked_fill(beyond, 0) for x in (result, expected))
    same(result, expected.to(dtype))
    if dtype == torch.float16:
        assert (result.abs() == torch.finfo(dtype).max).any(), "the largest number and itself average to it"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bilinear_merge_of_what_is_not_finite(dtype: torch.dtype, layout: str, target: Target) -> None:
    """A weight of zero is a factor too: infinity times zero is NaN in eager, and here."""
    target.require(dtype)
    lateral = torch.zeros(1, 16, 7, 12, dtype=dtype, device=target.device).contiguous(memory_format=FORMATS[layout])
    for value in (math.nan, math.inf, -math.inf):
        top = torch.ones(1, 16, 4, 5, dtype=dtype, device=target.device)
        top[0, 3, 2, 2] = value
        top = top.contiguous(memory_format=FORMATS[layout])
        with target.serves("upsample_add"):
            result = fpn_kernels.upsample_add(top, lateral, mode="bilinear")
        touched = reference.upsample_add(top.isfinite().logical_not().float(), lateral.float(), mode="bilinear") > 0
        assert not result[touched].isfinite().any()
        assert result[:, :3].isfinite().all() and result[:, 4:].isfinite().all(), "another channel's"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_a_gradient_of_any_values(mode: str, dtype: torch.dtype, layout: str, target: Target) -> None:
    """Each coarse pixel gathers only its own: one that is not finite stays with it."""
    target.require(dtype)
    values = torch.tensor(_special(dtype, target), dtype=torch.float64).to(dtype)
    grad = values.repeat_interleave(2).view(1, 1, 1, -1).expand(1, 16, 1, -1)
    grad = grad.to(target.device).contiguous(memory_format=FORMATS[layout])
    top = torch.zeros(1, 16, 1, len(values), dtype=dtype, device=target.device, requires_grad=True)
    with fpn_kernels.use_backend(target.backend):
        fpn_kernels.upsample_add(top, grad, mode=mode).backward(grad)
    # Each value and itself: an exact sum, but where it overflows.
    expected = (values.double() * 2).to(dtype).expand(16, -1)
    assert top.grad is not None
    torch.testing.assert_close(top.grad[0, :, 0].cpu(), expected, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------- weighted_merge


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weighted_merge_of_any_two_values(dtype: torch.dtype, layout: str, target: Target) -> None:
    """Eager's own in the wide dtype, a factor of zero included; in 16 bits rounded once."""
    target.require(dtype)
    top, lateral = _every_pair(dtype, target, layout)
    wide = torch.promote_types(dtype, torch.float32)
    # In 16 bits products with other factors may overflow in float32 in another order.
    for weights in ([0.7, 1.9], [1.0, -1.0], [3.0, 1.0]) if dtype == wide else ([3.0, 1.0],):
        factors, eps = torch.tensor(weights, dtype=wide, device=target.device), 1e-4 if dtype == wide else 0.0
        with target.serves("weighted_merge"):
            result = fpn_kernels.weighted_merge([lateral, top], factors, eps=eps)
        same(result, reference.weighted_merge([lateral.to(wide), top.to(wide)], factors, eps=eps).to(dtype))


# ------------------------------------------------------------------------------------------------ convolutions

CIN, COUT, SIZE = 17, 16, (9, 20)


def _convolution(kernel_size: int, dtype: torch.dtype, target: Target, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    feature = torch.randn(1, CIN, *SIZE).to(target.device, dtype)
    weight = torch.rand(COUT, CIN, kernel_size, kernel_size).to(target.device, dtype) + 0.5
    return feature.contiguous(memory_format=FORMATS[layout]), weight, torch.randn(COUT).to(target.device, dtype)


def _convolve(kernel_size: int, feature: Tensor, weight: Tensor, bias: Tensor | None, target: Target) -> Tensor:
    with fpn_kernels.use_backend(target.backend):
        if kernel_size == 1:
            return fpn_kernels.lateral_connection(feature, weight, bias)
        return fpn_kernels.output_conv(feature, weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_pixel_that_is_not_finite(kernel_size: int, dtype: torch.dtype, layout: str, target: Target) -> None:
    target.require(dtype)
    feature, weight, bias = _convolution(kernel_size, dtype, target, layout)
    clean = _convolve(kernel_size, feature, weight, bias, target)
    assert clean.isfinite().all()
    for (row, column), value in zip(((0, 0), (4, 9), (8, 19)), (math.nan, math.inf, -math.inf), strict=True):
        spoilt = feature.clone()
        spoilt[0, CIN - 1, row, column] = value
        with record_calls() as calls:
            result = _convolve(kernel_size, spoilt, weight, bias, target)
        reach = kernel_size // 2
        reads = torch.zeros(1, 1, *SIZE, dtype=torch.bool, device=target.device)
        reads[..., max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = True
        inside, outside = reads.expand_as(result), ~reads.expand_as(result)
        assert not result[inside].isfinite().any(), "a value was lost"
        if kernel_size == 1:
            # All weights are positive: infinity keeps its sign.
            expected = torch.full_like(result[inside], value)
            torch.testing.assert_close(result[inside], expected, equal_nan=True)
            # Other pixels do not know of it.
            assert torch.equal(result[outside], clean[outside])
        elif target.device != "cuda" or calls[-1][1] != "eager":
            # Not cuDNN's, which may transform a whole map (seen: 17 channels in float16, NHWC, on an H100).
            # By tiles of Winograd's (at most 6 x 6 results), those of the pixel's own and of its neighbours.
            far = F.max_pool2d(reads.float(), 13, stride=1, padding=6).expand_as(result) == 0
            assert torch.equal(result[far], clean[far])


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_parameter_that_is_not_finite(kernel_size: int, dtype: torch.dtype, where: str, target: Target) -> None:
    """It spoils its own output channel, and no other."""
    target.require(dtype)
    feature, weight, bias = _convolution(kernel_size, dtype, target, "nchw")
    for value in (math.nan, math.inf):
        parameters = [weight.clone(), bias.clone()]
        parameters[where == "bias"][5] = value
        result = _convolve(kernel_size, feature, *parameters, target)
        assert not result[:, 5].isfinite().any()
        assert result[:, :5].isfinite().all() and result[:, 6:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_sum_beyond_16_bits_is_infinite(kernel_size: int, layout: str, dtype: torch.dtype, target: Target) -> None:
    target.require(dtype)
    feature, weight, bias = _convolution(kernel_size, dtype, target, layout)
    large = torch.finfo(dtype).max / 8
    result = _convolve(kernel_size, torch.full_like(feature, large), weight, bias, target)
    assert torch.equal(result, torch.full_like(result, math.inf))
    result = _convolve(kernel_size, torch.full_like(feature, -large), weight, bias, target)
    assert torch.equal(result, torch.full_like(result, -math.inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_and_subnormals_in_a_lateral_connection(layout: str, dtype: torch.dtype, target: Target) -> None:
    """Zero times what is finite is zero; a subnormal times one is itself, or the zero that the hardware makes of it."""
    target.require(dtype)
    feature, weight, _ = _convolution(1, dtype, target, layout)
    zeros = _convolve(1, torch.zeros_like(feature), weight, None, target)
    assert torch.equal(zeros, torch.zeros_like(zeros))
    finfo = torch.finfo(dtype)
    tiny = finfo.smallest_normal / 4
    only = torch.zeros_like(weight)
    only[:, 3] = 1.0
    result = _convolve(1, torch.full_like(feature, tiny), only, None, target)
    eager = reference.lateral_connection(torch.full_like(feature, tiny), only)
    flushed = torch.zeros_like(result)
    assert torch.equal(result, torch.full_like(result, tiny)) or (
        # bfloat16 products flush subnormals; so do those of some vector libraries.
        dtype == torch.bfloat16 and torch.equal(result, flushed)
    )
    assert torch.equal(eager, torch.full_like(result, tiny)) or torch.equal(eager, flushed)
    # The top is added, not multiplied: its subnormals pass, but where bfloat16's instructions add it to the products.
    top = torch.full((1, COUT, 3, 4), tiny, dtype=dtype, device=target.device)
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.lateral_connection(torch.zeros_like(feature), weight, None, top)
    assert torch.equal(result, torch.full_like(result, tiny)) or (
        dtype == torch.bfloat16 and torch.equal(result, flushed)
    )


@needs_library
@pytest.mark.parametrize("level", LEVELS.values())
def test_a_slice_of_an_nhwc_map_does_not_see_the_other_channels(level: str) -> None:
    """Without vectors `native` merges by `torch.addmm`: with AMX that reads a column too many of an odd number."""
    whole = torch.full((1, 5, 6, 31), math.nan, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    feature = whole[:, :3]
    feature.copy_(torch.randn(1, 3, 6, 31))
    weight, top = torch.randn(8, 3, 1, 1).bfloat16(), torch.randn(1, 8, 3, 16).bfloat16()
    assert reference.lateral_connection(feature, weight, None, top).isfinite().all()
    number = next(number for number, name in LEVELS.items() if name == level)
    with limited(number), fpn_kernels.use_backend("native"):
        assert fpn_kernels.lateral_connection(feature, weight, None, top).isfinite().all()
