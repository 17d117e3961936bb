"""The compiled library: all ISAs give the same bits, and special cases of each kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import oracle
import pytest
import torch
from levels import LEVELS, here, limit, limited
from native_calls import by_native
from samples import MERGES, Sizes, random_map

import fpn_kernels
from fpn_kernels import native, reference, resampling

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["nchw", "nhwc", "sliced", "permuted", pytest.param("sliced-nhwc", marks=pytest.mark.nightly)]
WIDE = Sizes(1, 33, (5, 40), (10, 80), "lines of whole vectors, and channels with a tail")


@pytest.fixture
def levels() -> Iterator[list[int]]:
    """The ISAs of this CPU, in a test that may limit them."""
    with limited(max(LEVELS)):
        yield here()


def _on_every_isa(levels: list[int], compute: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    results = []
    for level in levels:
        limit(level)
        results.append(compute())
    for level, result in zip(levels[1:], results[1:], strict=True):
        for ours, plain in zip(result, results[0], strict=True):
            torch.testing.assert_close(
                ours, plain, rtol=0, atol=0, equal_nan=True, msg=lambda m, level=level: f"{LEVELS[level]}: {m}"
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_vector_and_scalar_paths_agree_bit_for_bit(
    mode: str, dtype: torch.dtype, layout: str, levels: list[int]
) -> None:
    for sizes in [*MERGES, WIDE]:
        top = random_map((sizes.batch, sizes.channels, *sizes.top), dtype, layout=layout)
        lateral = random_map((sizes.batch, sizes.channels, *sizes.fine), dtype, layout=layout)
        own = random_map(top.shape, dtype, layout="nhwc" if "nhwc" in layout else "nchw")
        _on_every_isa(
            levels,
            lambda top=top, lateral=lateral, own=own, sizes=sizes: (  # type: ignore[misc]
                by_native("upsample_add", top, lateral, mode, 0.7),
                by_native("upsample_add_backward", lateral, sizes.top, mode, 0.7),
                *by_native("merge_backward", lateral, sizes.top, None, mode, 0.7),
                *by_native("merge_backward", lateral, sizes.top, own, mode, 0.7),
            ),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_weighted_merges_agree_bit_for_bit(mode: str, dtype: torch.dtype, layout: str, levels: list[int]) -> None:
    factors = torch.tensor([0.3, -0.9, 1.7], dtype=torch.promote_types(dtype, torch.float32))
    for sizes in [*MERGES, WIDE]:
        places = (sizes.fine, sizes.top, sizes.fine)
        x, top, y = (random_map((sizes.batch, sizes.channels, *place), dtype, layout=layout) for place in places)
        _on_every_isa(
            levels,
            lambda x=x, top=top, y=y: (  # type: ignore[misc]
                by_native("weighted_merge", x, top, None, factors[:2], mode),
                by_native("weighted_merge", x, y, None, factors[1:], mode),
                by_native("weighted_merge", x, y, top, factors, mode),
                by_native("weighted_merge", x, top, top, factors, mode),
                *by_native("weighted_merge_backward", x, y, factors[2]),
            ),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_in_eager(dtype: torch.dtype, levels: list[int]) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    # Sums with these include ties, denormal numbers and overflow.
    for addend in (0.0, 1.0, -3.0, 2.0**-14, 3 * 2.0**-24, 1e-40, 60000.0, float("inf")):
        top = torch.full((1, 1, 1, 1), addend, dtype=dtype)
        expected = reference.upsample_add(top, every)
        for level in levels:
            limit(level)
            result = by_native("upsample_add", top, every, "nearest", 1.0)
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", resampling.MODES)
def test_a_result_written_past_the_caches(mode: str, dtype: torch.dtype, layout: str, levels: list[int]) -> None:
    """Results of 24 MB and more take other store instructions."""
    top = random_map((1, 64, 160, 160), dtype, layout=layout)
    lateral = random_map((1, 64, 320, 320), dtype, layout=layout)
    factors = torch.tensor([0.3, 0.5, -0.2])

    def results(channels: int) -> tuple[torch.Tensor, ...]:
        x, coarse = lateral[:, :channels], top[:, :channels]
        grad_input, _ = by_native("weighted_merge_backward", x, x, factors[0])
        return (
            by_native("upsample_add", coarse, x, mode, 1.0),
            by_native("weighted_merge", x, coarse, x, factors, mode),
            grad_input,
        )

    small = results(16)
    for level in levels:
        limit(level)
        large = results(64)
        for one, other in zip(large, small, strict=True):
            assert torch.equal(one[:, :16], other)
    if mode == "nearest":
        assert torch.equal(large[0], reference.upsample_add(top, lateral))


@pytest.mark.parametrize("mode", resampling.MODES)
def test_an_infinite_gradient_stays_with_its_pixel(mode: str) -> None:
    grad = torch.ones(1, 2, 6, 10).contiguous(memory_format=torch.channels_last)
    grad[0, 0, 0, 0] = float("inf")
    grad_top = by_native("upsample_add_backward", grad, (3, 40), "nearest", 1.0)  # the resize shrank along one axis
    assert torch.isinf(grad_top[0, 0]).sum() == 1 and not torch.isnan(grad_top).any()
    grad_top = by_native("upsample_add_backward", grad.contiguous(), (3, 40), "nearest", 1.0)
    assert torch.isinf(grad_top[0, 0]).sum() == 1 and not torch.isnan(grad_top).any()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", resampling.MODES)
def test_the_number_of_threads_does_not_show(mode: str, layout: str) -> None:
    grad = random_map((2, 24, 75, 113), torch.float32, layout=layout)
    feature, weight = random_map((2, 40, 75, 113), torch.float32, layout=layout), torch.randn(24, 40)
    top = random_map((2, 24, 38, 57), torch.float32, layout=layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with fpn_kernels.use_backend("native"):
                merged = by_native("upsample_add", top, grad, mode, 1.0)
                connected = fpn_kernels.lateral_connection(feature, weight, None, top, mode=mode)
            weighted = by_native("weighted_merge", grad, top, grad, torch.tensor([0.3, 0.5, 0.2]), mode)
            gathered = by_native("merge_backward", grad, (38, 57), None, mode, 1.0)
            products = by_native("weighted_merge_backward", grad, merged, torch.tensor(0.3))
            results.append((*gathered, *products, merged, weighted, connected))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result[:-1], results[0][:-1], strict=True):
            assert torch.equal(ours, first)
        torch.testing.assert_close(result[-1], results[0][-1])


@pytest.mark.parametrize("gain", [1.0, 0.7])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("has_top", [False, True], ids=["no top", "top"])
@pytest.mark.parametrize("formats", ["nchw-nchw", "nchw-nhwc", "nhwc-nhwc", "nhwc-nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_matrix_products(
    dtype: torch.dtype, formats: str, has_top: bool, has_bias: bool, gain: float, levels: list[int]
) -> None:
    """The library's and PyTorch's, with several blocks and chunks."""
    source, result_format = formats.split("-")
    memory_format = torch.channels_last if result_format == "nhwc" else torch.contiguous_format
    feature, top = (
        random_map((2, 301, 22, 37), dtype, layout=source),
        random_map((2, 45, 11, 19), dtype, layout=result_format),
    )
    weight, bias = random_map((45, 301, 1, 1), dtype).flatten(1) / 17, random_map((1, 45, 1, 1), dtype).flatten()
    arguments = (feature, weight, bias if has_bias else None, top if has_top else None)
    exact = oracle.lateral_connection(*arguments, gain=gain)
    for level in (levels[0], *levels[2:]):
        limit(level)
        result = by_native("lateral_connection", *arguments, "nearest", gain, memory_format)
        assert result.is_contiguous(memory_format=memory_format)
        # 16 bits through PyTorch's product are rounded twice.
        assert oracle.error(result, exact) <= {torch.float32: 8, torch.float64: 32}.get(dtype, 2) * oracle.rounding(
            dtype
        )


@pytest.mark.parametrize("operator", ["weighted_merge", "weighted_merge_backward"])
def test_a_contiguous_column_may_have_any_stride_along_its_rows(operator: str) -> None:
    """A transposed row of pixels is contiguous, with an arbitrary stride that was once used."""
    column = random_map((2, 3, 1, 9), torch.float32).transpose(2, 3)
    plain = column.clone(memory_format=torch.contiguous_format)
    assert column.is_contiguous() and column.stride(3) == 9 and plain.stride(3) == 1
    factors = torch.tensor([0.3, 0.5])
    if operator == "weighted_merge":
        result = by_native("weighted_merge", column, column, None, factors, "nearest")
        assert torch.equal(result, by_native("weighted_merge", plain, plain, None, factors, "nearest"))
    else:
        result, product = by_native("weighted_merge_backward", column, column, factors[0])
        expected, same = by_native("weighted_merge_backward", plain, plain, factors[0])
        assert torch.equal(result, expected) and torch.equal(product, same)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_subnormals_are_flushed_everywhere_or_nowhere(memory_format: torch.memory_format, levels: list[int]) -> None:
    """The end of a line, shorter than a vector, is rounded like whole vectors."""
    tiny = torch.finfo(torch.bfloat16).smallest_normal / 4
    feature = torch.zeros(1, 8, 6, 21, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    top = torch.full((1, 21, 3, 11), tiny, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    for level in levels:
        limit(level)
        result = by_native("lateral_connection", feature, torch.ones(21, 8).bfloat16(), None, top, "nearest", 1.0, None)
        assert len(result.unique()) == 1
