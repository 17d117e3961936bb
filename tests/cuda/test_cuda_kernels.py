"""The kernels of `csrc/cuda`, thread by thread on the host: each path, its choice, and its index arithmetic.

They sum in the order of the CPU kernels, so the results are compared bit for bit.
"""

from __future__ import annotations

import ctypes
import random

import cuda_on_host
import pytest
import torch
from building import setup_module
from native_calls import by_native
from samples import LAYOUTS, MERGES, Sizes, random_map

from fpn_kernels import native, resampling

pytestmark = [
    pytest.mark.skipif(setup_module().compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WHOLE = Sizes(2, 16, (6, 16), (12, 32), "rows and channels of whole accesses")
UNEVEN = Sizes(2, 24, (5, 7), (12, 17), "channels of whole accesses at ratios that are not whole")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_the_same_bits_as_on_the_cpu(mode: str, dtype: torch.dtype, layout: str) -> None:
    for sizes in [*MERGES, WHOLE, UNEVEN]:
        top = random_map((sizes.batch, sizes.channels, *sizes.top), dtype, layout=layout)
        lateral = random_map((sizes.batch, sizes.channels, *sizes.fine), dtype, layout=layout)
        merged, _ = cuda_on_host.upsample_add(top, lateral, mode, 0.7)
        assert torch.equal(merged, by_native("upsample_add", top, lateral, mode, 0.7)), sizes
        grad_top, _ = cuda_on_host.upsample_add_backward(lateral, sizes.top, mode, 0.7)
        assert torch.equal(grad_top, by_native("upsample_add_backward", lateral, sizes.top, mode, 0.7)), sizes


# sizes, layout, mode -> paths of the forward and of the backward
PATHS = {
    "NHWC at ratio 2": (WHOLE, "nhwc", "nearest", "nhwc_doubled", "nhwc_doubled"),
    "NHWC, nearest-exact": (WHOLE, "nhwc", "nearest-exact", "nhwc_doubled", "nhwc_doubled"),
    "NHWC, bilinear": (WHOLE, "nhwc", "bilinear", "nhwc", "nhwc"),
    "NHWC at another ratio": (UNEVEN, "nhwc", "nearest", "nhwc", "nhwc"),
    "NCHW at ratio 2": (WHOLE, "nchw", "nearest", "nchw_doubled", "nchw_doubled"),
    "NCHW, bilinear": (WHOLE, "nchw", "bilinear", "nchw", "strided"),
    "NCHW at another ratio": (UNEVEN, "nchw", "nearest", "nchw", "strided"),
    "a tail of channels": (MERGES[2], "nhwc", "nearest", "strided", "strided"),
    "misaligned": (WHOLE, "misaligned", "nearest", "strided", "strided"),
    "permuted": (WHOLE, "permuted", "nearest", "strided", "strided"),
    "expanded rows": (WHOLE, "expanded", "nearest", "nchw_doubled", "nchw_doubled"),
    "every second pixel": (WHOLE, "sliced", "nearest", "strided", "strided"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATHS)
def test_the_path_that_a_call_takes(case: str, dtype: torch.dtype) -> None:
    sizes, layout, mode, forward, backward = PATHS[case]
    top = random_map((sizes.batch, sizes.channels, *sizes.top), dtype, layout=layout)
    lateral = random_map((sizes.batch, sizes.channels, *sizes.fine), dtype, layout=layout)
    assert cuda_on_host.upsample_add(top, lateral, mode)[1] == forward
    assert cuda_on_host.upsample_add_backward(lateral, sizes.top, mode)[1] == backward


def test_a_window_of_a_larger_map_keeps_whole_accesses() -> None:
    """A slice whose start and strides are whole accesses, in either layout; one pixel further they are not."""
    whole = random_map((2, 32, 20, 48), torch.bfloat16, layout="nhwc")
    top = random_map((2, 16, 6, 16), torch.bfloat16, layout="nhwc")
    assert cuda_on_host.upsample_add(top, whole[:, 8:24, 1:13, 3:35])[1] == "nhwc_doubled"
    assert cuda_on_host.upsample_add(top, whole[:, 4:20, 1:13, 3:35])[1] == "strided"
    rows = whole.contiguous()
    assert cuda_on_host.upsample_add(top.contiguous(), rows[:, 8:24, 1:13, 8:40])[1] == "nchw_doubled"
    assert cuda_on_host.upsample_add(top.contiguous(), rows[:, 8:24, 1:13, 9:41])[1] == "strided"
    for lateral in (whole[:, 8:24, 1:13, 3:35], rows[:, 8:24, 1:13, 8:40]):
        source = top if lateral.stride(1) == 1 else top.contiguous()
        assert torch.equal(
            cuda_on_host.upsample_add(source, lateral)[0], by_native("upsample_add", source, lateral, "nearest", 1.0)
        )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", resampling.MODES)
def test_counting_in_64_bits(mode: str, layout: str) -> None:
    """The variant for maps of 2^31 elements or more, on small maps."""
    for sizes in MERGES[2:10]:
        top = random_map((sizes.batch, sizes.channels, *sizes.top), torch.float32, layout=layout)
        lateral = random_map((sizes.batch, sizes.channels, *sizes.fine), torch.float32, layout=layout)
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        out = cuda_on_host.poisoned(tuple(lateral.shape), lateral, memory_format)
        call = cuda_on_host.merge_call(top, lateral, out, mode, 0.7)
        cuda_on_host.library().merge_run_large(ctypes.byref(call))
        assert torch.equal(out, by_native("upsample_add", top, lateral, mode, 0.7)), sizes
        grad_top = cuda_on_host.poisoned(tuple(top.shape), top, memory_format)
        adjoint = cuda_on_host.adjoint_call(lateral, grad_top, mode, 0.7)
        cuda_on_host.library().adjoint_run_large(ctypes.byref(adjoint))
        assert torch.equal(grad_top, by_native("upsample_add_backward", lateral, sizes.top, mode, 0.7)), sizes


def test_maps_of_more_elements_than_31_bits_count() -> None:
    """Only strides and sizes are used; the tensors have no memory."""
    large = torch.empty(1).expand(3, 64, 4096, 4096)
    nchw = torch.empty_strided((3, 64, 4096, 4096), (2**30, 2**24, 4096, 1), device="meta")
    merge = cuda_on_host.merge_call(large[..., ::2, ::2], large, large, "nearest", 1.0)
    for tensor in (merge.lateral, merge.out):
        tensor.n, tensor.c, tensor.y, tensor.x = nchw.stride()
        tensor.data = 1 << 20
    path = cuda_on_host.library().merge_path(ctypes.byref(merge))
    assert cuda_on_host.PATHS[path] == "strided"  # an expanded top; 3 * 2^30 elements
    merge.top.n, merge.top.c, merge.top.y, merge.top.x = 2**28, 2**22, 2048, 1
    merge.top.data = 1 << 20
    path = cuda_on_host.library().merge_path(ctypes.byref(merge))
    assert cuda_on_host.PATHS[path] == "nchw_doubled"  # counted in accesses, not in elements


@pytest.mark.nightly
def test_division_by_multiplication() -> None:
    divisors = [*range(1, 300), *(random.randrange(1, 2**31) for _ in range(300)), 2**31 - 1, 2**30, 2**30 + 1]
    for divisor in divisors:
        for first, step, count in ((0, 1, 2000), (2**31 - 2000, 1, 2000), (random.randrange(10**6), 10**6 + 7, 2000)):
            assert cuda_on_host.library().wrong_division(divisor, first, step, count) == -1, divisor
        around = (2**31 - 1) // divisor * divisor - 1
        assert cuda_on_host.library().wrong_division(divisor, max(around, 0), 1, 2) == -1, divisor


@pytest.mark.nightly
@pytest.mark.parametrize("mode", range(len(resampling.MODES)), ids=resampling.MODES)
def test_the_ranges_of_the_adjoint_at_every_pair_of_sizes(mode: int) -> None:
    assert cuda_on_host.library().wrong_ranges(257, 513, mode) == -1


@pytest.mark.parametrize("mode", range(len(resampling.MODES)), ids=resampling.MODES)
def test_the_ranges_of_the_adjoint_at_extreme_sizes(mode: int) -> None:
    for coarse, fine in ((1, 65536), (65536, 1), (65536, 65535), (40000, 65536), (3, 100003), (100003, 200009)):
        assert cuda_on_host.library().ranges_are_exact(coarse, fine, mode) == 1, (coarse, fine)
