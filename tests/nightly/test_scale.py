"""Long, thin, many and huge maps, at which an index, a count of pixels or a share of the work may overflow."""

from __future__ import annotations

import oracle
import pytest
import torch
from samples import random_map
from targets import INTERPRETED, Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference, resampling

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a long map takes minutes under the interpreter")

LONG = 65536
THIN = {"one column": (LONG, 1), "one row": (1, LONG)}


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return tuple((side + 1) // 2 - (side > 1) for side in size)  # not whole, but for a side of one


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", resampling.MODES)
@pytest.mark.parametrize("thin", THIN)
def test_thin_maps(thin: str, mode: str, channels: int, layout: str, target: Target) -> None:
    size = THIN[thin]
    top = random_map((1, channels, *_half(size)), torch.float32, target.device, layout)
    lateral = random_map((1, channels, *size), torch.float32, target.device, layout)
    with target.serves("upsample_add", "upsample_add_backward"):
        result = fpn_kernels.upsample_add(top.requires_grad_(), lateral, mode=mode)
        (grad_top,) = torch.autograd.grad(result, top, lateral)
    if mode != "bilinear":
        indices = [resampling.source_index(i, o, mode, target.device) for i, o in zip(top.shape[2:], size, strict=True)]
        resized = top.detach()[:, :, indices[0]][:, :, :, indices[1]]
        assert torch.equal(result, lateral + resized)
        # The adjoint: what each pixel is read by, added up.
        gathered = torch.zeros(top.shape, dtype=torch.float64, device=target.device)
        axis = 2 if thin == "one column" else 3
        gathered.index_add_(axis, indices[axis - 2], lateral.double())
        torch.testing.assert_close(grad_top.double(), gathered, rtol=0, atol=1e-5)
    else:
        eager = reference.upsample_add(top.double(), lateral.double(), mode=mode)
        # Two ways to compute a position round it at its own size.
        torch.testing.assert_close(result.double(), eager, rtol=0, atol=16 * LONG * torch.finfo(torch.float32).eps)
        inner = (grad_top.double() * top.double()).sum(), ((result - lateral).double() * lateral.double()).sum()
        torch.testing.assert_close(*inner, rtol=0, atol=1e-6 * lateral.numel())


@pytest.mark.parametrize("thin", THIN)
def test_thin_convolutions(thin: str, target: Target) -> None:
    size = THIN[thin]
    feature = random_map((1, 2, *size), torch.float32, target.device)
    connect = [feature, random_map((3, 2, 1, 1), torch.float32, target.device), torch.randn(3, device=target.device)]
    connect.append(random_map((1, 3, *_half(size)), torch.float32, target.device))
    convolve = [feature, random_map((3, 2, 3, 3), torch.float32, target.device)]
    for name, tensors in (("lateral_connection", connect), ("output_conv", convolve)):
        if target.implements(name):
            with fpn_kernels.use_backend(target.backend):
                result = getattr(fpn_kernels, name)(*tensors)
            exact = getattr(reference, name)(*(tensor.double().cpu() for tensor in tensors))
            assert oracle.error(result, exact) <= 1e-6


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_many_maps_of_one_pixel(layout: str, target: Target) -> None:
    batch = 10_000
    top, feature = (random_map((batch, c, 1, 1), torch.float32, target.device, layout) for c in (5, 7))
    weight, lateral = (
        random_map((5, 7, 1, 1), torch.float32, target.device),
        random_map(top.shape, torch.float32, target.device),
    )
    with fpn_kernels.use_backend(target.backend):
        for mode in resampling.MODES:
            assert torch.equal(fpn_kernels.upsample_add(top, lateral, mode=mode), lateral + top)
        merged = fpn_kernels.weighted_merge([top, lateral], torch.ones(2, device=target.device), eps=0.0)
        torch.testing.assert_close(merged, (top + lateral) / 2)
        connected = fpn_kernels.lateral_connection(feature, weight, None, top)
        torch.testing.assert_close(
            connected, torch.einsum("nkyx,okyx->noyx", feature, weight) + top, rtol=1e-5, atol=1e-5
        )
        if target.implements("output_conv"):
            taps = random_map((5, 7, 3, 3), torch.float32, target.device)
            middle = torch.einsum("nkyx,ok->noyx", feature, taps[:, :, 1, 1])
            torch.testing.assert_close(fpn_kernels.output_conv(feature, taps), middle, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- more than 2**31 elements: `make test-large`

HUGE = (1, 3, 26_000, 28_000)  # 2.18e9 elements, 4.4 GB in 16 bits
assert HUGE[1] * HUGE[2] * HUGE[3] > 2**31


def _row(top: Tensor, lateral: Tensor, y: int, channel: int) -> Tensor:
    """One row of the merge in the nearest mode, by itself."""
    rows, columns = (resampling.source_index(i, o) for i, o in zip(top.shape[2:], lateral.shape[2:], strict=True))
    return lateral[0, channel, y] + top[0, channel, rows[y]][columns]


ROWS = [(0, 0), (0, 25_999), (1, 13_000), (2, 1), (2, 24_700), (2, 25_999)]  # before, at and beyond 2**31 elements


@pytest.mark.large
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_result_of_more_than_2_31_elements(layout: str) -> None:
    """The lateral is one row, expanded: the result is what takes the memory."""
    top = random_map((1, 3, 1300, 1400), torch.bfloat16, layout=layout)
    if layout == "nchw":
        lateral = random_map((1, 3, 1, HUGE[3]), torch.bfloat16).expand(HUGE)
    else:
        line = random_map((1, 3, 1, HUGE[3]), torch.bfloat16, layout="nhwc")
        lateral = line.as_strided(HUGE, (0, 1, 0, 3))
    with fpn_kernels.use_backend("native"):
        result = fpn_kernels.upsample_add(top, lateral)
    assert result.numel() > 2**31
    for channel, y in ROWS:
        assert torch.equal(result[0, channel, y], _row(top, lateral, y, channel)), (channel, y)


@pytest.mark.large
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_strides_that_reach_beyond_2_31_elements(layout: str) -> None:
    """A gradient of 4.4 GB, all of it read."""
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    grad = torch.zeros(HUGE, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    for channel, y in ROWS:
        grad[0, channel, y] = 1 + channel
    with fpn_kernels.use_backend("native"):
        gathered = torch.ops.fpn_kernels.upsample_add_backward(grad, (13, 14))
        of_top, of_bias = torch.ops.fpn_kernels.merge_backward(grad, (13, 14), None)
    expected = torch.zeros(1, 3, 13, 14)
    for channel, y in ROWS:
        expected[0, channel, y // 2000] += (1 + channel) * 2000
    torch.testing.assert_close(gathered.float(), expected, rtol=2**-8, atol=0)
    assert torch.equal(of_top, gathered)
    torch.testing.assert_close(of_bias.float(), expected.sum((0, 2, 3)), rtol=2**-8, atol=0)


@pytest.mark.large
def test_a_convolution_into_more_than_2_31_elements() -> None:
    size = (9_000, 8_000)  # 30 channels: 2.16e9 elements
    feature = random_map((1, 1, 1, size[1]), torch.bfloat16).expand(1, 1, *size)
    weight, bias = random_map((30, 1, 1, 1), torch.bfloat16), random_map((1, 30, 1, 1), torch.bfloat16).flatten()
    top = random_map((1, 30, 900, 800), torch.bfloat16)
    with fpn_kernels.use_backend("native"):
        result = fpn_kernels.lateral_connection(feature, weight, bias, top)
    assert result.numel() > 2**31
    rows, columns = (resampling.source_index(i, o) for i, o in zip(top.shape[2:], size, strict=True))
    for channel, y in ((0, 0), (29, 8_999), (29, 8_400), (15, 4_500)):
        exact = feature[0, 0, y].double() * weight[channel, 0].double() + bias[channel].double()
        exact = exact.flatten() + top[0, channel, rows[y]][columns].double()
        torch.testing.assert_close(result[0, channel, y].double(), exact, rtol=2**-7, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_result_of_more_than_2_31_elements_on_a_gpu(backend: str, layout: str) -> None:
    """As above, but in many channels: a side of a map has to fit."""
    if Target(backend, "cuda", backend).unavailable():
        pytest.skip(f"{backend} is not available for this GPU")
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    shape = (1, 520, 2048, 2050)
    top = random_map((1, 520, 1024, 1025), torch.bfloat16, "cpu", layout).to("cuda")
    lateral = torch.zeros((), dtype=torch.bfloat16, device="cuda").expand(shape)
    with fpn_kernels.use_backend(backend):
        result = fpn_kernels.upsample_add(top, lateral)
    for channel in (0, 259, 511, 519):
        expected = top[:, channel].repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(result[:, channel], expected)
