"""`weighted_merge`: exact bits, rounding once, numbers that are not finite, and weights of any dtype."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from nodes import NODES, UNEVEN, fusion_weights, maps, require_node, spread
from samples import DTYPES, LAYOUTS, MERGES, Sizes, random_map
from targets import Target

import fpn_kernels
from fpn_kernels import reference, resampling

NORMALIZATIONS = ["relu", "softmax"]
MODES = resampling.MODES
NUMPY = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # under Triton's interpreter


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("node", NODES)
def test_the_sum_is_rounded_once(node: str, mode: str, target: Target) -> None:
    places = itertools.cycle(itertools.product(target.dtypes(), NORMALIZATIONS))
    for sizes in target.affordable(MERGES):
        dtype, normalization = next(places)
        require_node(target, node, sizes, dtype)
        inputs = maps(node, sizes, dtype, target.device)
        weights = fusion_weights(len(inputs), target.device)
        with target.serves("weighted_merge"):
            result = fpn_kernels.weighted_merge(inputs, weights, normalization=normalization, mode=mode)
        # The factors themselves are float32 (float64): a few roundings of every term.
        largest = sum(float(x.abs().max()) for x in inputs)
        exact = oracle.weighted_merge(inputs, oracle.fusion_factors(weights, normalization), mode)
        oracle.within_rounding(result, exact, largest * spread(mode, sizes.top))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("node", ["a top-down node", "a bottom-up node", "a coarse map last"])
def test_nearest_equals_eager_bit_for_bit(node: str, dtype: torch.dtype, target: Target) -> None:
    """Products and sums, each rounded, from the first map to the last, are those of eager's own chain."""
    target.require(dtype)
    for sizes, normalization in itertools.product(target.affordable(MERGES), NORMALIZATIONS):
        axes = zip(sizes.top, sizes.fine, strict=True)
        if target.device == "cpu" and not all(resampling.indices_agree(i, o, "nearest", dtype) for i, o in axes):
            continue
        inputs = maps(node, sizes, dtype, target.device)
        weights = fusion_weights(len(inputs), target.device, dtype)
        # Eager's own factors: a GPU's exponential and the order of its sum of three weights are its own.
        factors = weights.softmax(0) if normalization == "softmax" else weights.relu() / (weights.relu().sum() + 1e-4)
        expected = reference.weighted_merge(inputs, weights, normalization=normalization)
        third = inputs[2] if len(inputs) == 3 else None
        with target.serves("weighted_merge"):
            assert torch.equal(torch.ops.fpn_kernels.weighted_merge(*inputs[:2], third, factors), expected)
            if target.backend != "triton":
                assert torch.equal(fpn_kernels.weighted_merge(inputs, weights, normalization=normalization), expected)


@pytest.mark.nightly
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_every_pair_of_layouts(other: str, first: str, target: Target) -> None:
    for node, mode in itertools.product(("a top-down node", "a bottom-up node"), MODES):
        inputs = maps(node, UNEVEN, torch.float32, target.device, (first, other, "permuted"))
        weights = torch.rand(6, device=target.device)[:: 6 // len(inputs)]
        with target.serves("weighted_merge"):
            result = fpn_kernels.weighted_merge(inputs, weights, mode=mode)
        exact = oracle.weighted_merge(inputs, oracle.fusion_factors(weights), mode)
        oracle.within_rounding(result, exact, 8 * sum(float(x.abs().max()) for x in inputs))


@NUMPY
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite(dtype: torch.dtype, layout: str, target: Target) -> None:
    """As in float arithmetic: infinity times a factor of 0 is NaN, and stays in its pixel."""
    target.require(dtype)
    sizes = Sizes(1, 16, (5, 20), (10, 40), "whole vectors")
    inputs = maps("a coarse map last", sizes, dtype, target.device, (layout,) * 3)
    inputs[0][0, 0, 0, 0] = float("nan")
    inputs[1][0, 1, 3, 2] = float("inf")
    inputs[2][0, 2, 1, 1] = float("-inf")
    for values in ([0.5, 0.25, 0.25], [0.5, 0.0, 0.0], [float("nan"), 1.0, 0.0]):
        factors = torch.tensor(values, device=target.device, dtype=torch.promote_types(dtype, torch.float32))
        with target.serves("weighted_merge"):
            result = torch.ops.fpn_kernels.weighted_merge(*inputs, factors)
        # The oracle's matrices would multiply other pixels by zero: repeated pixels are compared instead.
        repeated = inputs[2].double().cpu().repeat_interleave(2, 2).repeat_interleave(2, 3)
        exact = oracle.weighted_merge([*inputs[:2], repeated], factors)
        torch.testing.assert_close(result.double().cpu(), exact.to(dtype).double(), rtol=0.01, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_map_of_the_same_size_is_not_resized(layout: str, mode: str, target: Target) -> None:
    """An infinite pixel does not reach its neighbours, not even times a bilinear weight of 0."""
    first, second = maps("two of one size", UNEVEN, torch.float32, target.device, (layout,) * 2)
    second[0, 1, 3, 2] = float("inf")
    with target.serves("weighted_merge"):
        result = fpn_kernels.weighted_merge([first, second], fusion_weights(2, target.device), mode=mode)
    assert result.isinf().sum() == 1 and not result.isnan().any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2fnuz], ids=str
)
def test_weights_of_any_dtype_and_stride(dtype: torch.dtype, target: Target) -> None:
    """The same bits as for the same numbers in float32."""
    for count, normalization, of_maps in ((2, "softmax", torch.bfloat16), (3, "relu", torch.float32)):
        inputs = maps("a bottom-up node", UNEVEN, of_maps, target.device)[:count]
        spaced = torch.tensor([0.3, 9.0, 1.7, 9.0, -0.4, 9.0], device=target.device).to(dtype)[: 2 * count : 2]
        weights, plain = spaced.detach().requires_grad_(), spaced.float().requires_grad_()
        with target.serves("weighted_merge"):
            result, expected = (
                fpn_kernels.weighted_merge(inputs, each, normalization=normalization) for each in (weights, plain)
            )
        assert torch.equal(result, expected)
        grad = random_map(result.shape, of_maps, target.device)
        with fpn_kernels.use_backend(target.backend):
            (of_weights,) = torch.autograd.grad(result, weights, grad)
            (of_plain,) = torch.autograd.grad(expected, plain, grad)
        # Compared in float32: 8-bit floats cannot be compared.
        assert of_weights.dtype == dtype and torch.equal(of_weights.float(), of_plain.to(dtype).float())


@pytest.mark.gpu
def test_the_host_does_not_read_the_weights() -> None:
    inputs = maps("a coarse map last", UNEVEN, torch.float32, "cuda", grad=True)
    weights = fusion_weights(3, "cuda", grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fpn_kernels.weighted_merge(inputs, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weights.grad is not None and weights.grad.isfinite().all()


def test_bad_arguments_of_the_operator_are_named() -> None:
    """The operator, whose weights may be normalised already, has errors that the public function does not have."""
    x, y = maps("two of one size", UNEVEN, torch.bfloat16)
    merge, ones = torch.ops.fpn_kernels.weighted_merge, torch.ones(2)
    for third, weights, normalization, error, message in (
        (None, ones.bfloat16(), "none", TypeError, "weights: expected torch.float32, in which .*bfloat16 are summed"),
        (y, ones, "none", ValueError, r"weights: expected the shape \[3\]"),
        (None, ones.to("meta"), "none", ValueError, "weights: expected the device of the maps, cpu, got meta"),
        (None, ones, "sum", ValueError, "normalization: expected one of 'relu', 'softmax', 'none', got 'sum'"),
    ):
        with pytest.raises(error, match=message):
            merge(x, y, third, weights, normalization=normalization)
