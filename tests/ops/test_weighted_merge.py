"""`weighted_merge` on every backend that is here."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from nodes import (
    DTYPES,
    MODES,
    NODES,
    NORMALIZATIONS,
    UNEVEN,
    exact_factors,
    fusion_weights,
    maps,
    require_node,
    spread,
)
from samples import LAYOUTS, MERGES, Sizes, random_map
from targets import Target

import fpn_kernels
from fpn_kernels import reference, resampling
from fpn_kernels.backends import triton
from fpn_kernels.backends.eager import normalized


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("node", NODES)
def test_the_sum_is_rounded_once(node: str, mode: str, dtype: torch.dtype, target: Target) -> None:
    for sizes, normalization in zip(target.affordable(MERGES), itertools.cycle(NORMALIZATIONS), strict=False):
        require_node(target, node, sizes, dtype)
        inputs = maps(node, sizes, dtype, target.device)
        weights = fusion_weights(len(inputs), target.device)
        with target.serves("weighted_merge"):
            result = fpn_kernels.weighted_merge(inputs, weights, normalization=normalization, mode=mode)
        assert result.shape == inputs[0].shape and result.dtype == dtype
        # The factors themselves are float32 (float64): a few roundings of every term.
        largest = sum(float(x.abs().max()) for x in inputs)
        exact = oracle.weighted_merge(inputs, exact_factors(weights, normalization), mode)
        oracle.within_rounding(result, exact, largest * spread(mode, sizes.top))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("node", ["a top-down node", "a bottom-up node", "a coarse map last"])
def test_nearest_equals_eager_bit_for_bit(node: str, normalization: str, dtype: torch.dtype, target: Target) -> None:
    """Products and sums, each rounded, from the first map to the last, are what eager's own chain computes."""
    target.require(dtype)
    for sizes in target.affordable(MERGES):
        axes = zip(sizes.top, sizes.fine, strict=True)
        if target.device == "cpu" and not all(resampling.indices_agree(i, o, "nearest", dtype) for i, o in axes):
            continue
        inputs = maps(node, sizes, dtype, target.device)
        weights = fusion_weights(len(inputs), target.device, dtype)
        expected = reference.weighted_merge(inputs, weights, normalization=normalization)
        # A GPU's exponential is its own, and so is the order in which PyTorch adds up three weights there.
        factors = normalized(weights, inputs[0], normalization, 1e-4)
        third = inputs[2] if len(inputs) == 3 else None
        with target.serves("weighted_merge"):
            assert torch.equal(torch.ops.fpn_kernels.weighted_merge(*inputs[:2], third, factors), expected)
            if target.backend != "triton":
                assert torch.equal(fpn_kernels.weighted_merge(inputs, weights, normalization=normalization), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_any_strides(other: str, first: str, target: Target) -> None:
    mode = MODES[(LAYOUTS.index(first) + LAYOUTS.index(other)) % len(MODES)]
    for node in ("a top-down node", "a bottom-up node"):
        inputs = maps(node, UNEVEN, torch.float32, target.device, (first, other, "permuted"))
        before = [x.clone() for x in inputs]
        weights = torch.rand(6, device=target.device)[:: 6 // len(inputs)]
        with target.serves("weighted_merge"):
            result = fpn_kernels.weighted_merge(inputs, weights, mode=mode)
        exact = oracle.weighted_merge(inputs, exact_factors(weights), mode)
        oracle.within_rounding(result, exact, 8 * sum(float(x.abs().max()) for x in inputs))
        is_nhwc = first in ("nhwc", "sliced-nhwc")
        assert result.is_contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)
        assert all(torch.equal(x, was) for x, was in zip(inputs, before, strict=True))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "permuted"])
def test_opcheck(layout: str, mode: str, requires_grad: bool, target: Target) -> None:
    operators, small = torch.ops.fpn_kernels, Sizes(1, 3, (2, 3), (3, 5), "the operator is called some twenty times")
    for node in ("a top-down node", "a coarse map last"):
        inputs = maps(node, small, torch.float32, target.device, (layout,) * 3, grad=requires_grad)
        third = inputs[2] if len(inputs) == 3 else None
        weights = torch.rand(len(inputs), device=target.device, requires_grad=requires_grad)
        of_three = "none" if mode == "nearest" else "softmax"
        normalization = "relu" if third is None else of_three
        keywords = {"mode": mode, "normalization": normalization, "eps": 0.25}
        target.opcheck(operators.weighted_merge.default, (inputs[0], inputs[1], third, weights), keywords)
        arguments = (inputs[0], torch.randn_like(inputs[0]), weights[0].detach())
        target.opcheck(operators.weighted_merge_backward.default, arguments)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no images", "no channels"])
@pytest.mark.parametrize("node", ["a top-down node", "a bottom-up node"])
def test_empty(node: str, shape: tuple[int, int], target: Target) -> None:
    sizes = Sizes(*shape, (2, 3), (4, 6), "nothing")
    inputs = maps(node, sizes, torch.float32, target.device, grad=True)
    weights = fusion_weights(len(inputs), target.device, grad=True)
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.weighted_merge(inputs, weights)
        result.sum().backward()
    assert result.shape == inputs[0].shape
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
    assert weights.grad is not None and torch.equal(weights.grad, torch.zeros_like(weights))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_what_is_not_finite_goes_through(layout: str, dtype: torch.dtype, target: Target) -> None:
    """As in float arithmetic: infinity times a factor of 0 is NaN, and stays with its pixel."""
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
        exact = oracle.weighted_merge(inputs, factors)
        # The oracle's matrices multiply what is not read by zero: the pixels are compared by repeating them instead.
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weight_above_zero(dtype: torch.dtype, target: Target) -> None:
    """The paper's formula: 0 over eps; and 0 over 0 where there is no eps."""
    target.require(dtype)
    inputs = maps("a top-down node", UNEVEN, dtype, target.device, grad=True)
    weights = torch.tensor([-1.0, 0.0], device=target.device, requires_grad=True)
    with fpn_kernels.use_backend(target.backend):
        result = fpn_kernels.weighted_merge(inputs, weights)
        assert torch.equal(result, torch.zeros_like(result))
        gradients = torch.autograd.grad(result.float().sum(), (*inputs, weights))
        assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)
        assert fpn_kernels.weighted_merge(inputs, weights, eps=0).isnan().all()


def test_autocast_casts_the_maps_and_not_the_weights(target: Target) -> None:
    first, other = maps("a top-down node", MERGES[0], torch.float32, target.device, grad=True)
    weights = torch.tensor([0.3, 0.7000123], device=target.device, requires_grad=True)
    with torch.autocast(target.device, dtype=torch.bfloat16), target.serves("weighted_merge"):
        result = fpn_kernels.weighted_merge([first, other.bfloat16()], weights)
    exact = oracle.weighted_merge(
        [first.detach().bfloat16(), other.detach().bfloat16()], exact_factors(weights.detach())
    )
    assert result.dtype == torch.bfloat16
    oracle.within_rounding(result, exact, 10.0)
    result.float().sum().backward()
    assert first.grad is not None and first.grad.dtype == torch.float32
    assert weights.grad is not None and weights.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    inputs = maps("a top-down node", MERGES[0], torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fpn_kernels.weighted_merge(inputs, fusion_weights(2)).dtype == torch.float64


WEIGHT_DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2fnuz]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_weights_of_any_dtype(dtype: torch.dtype, target: Target) -> None:
    """Of any strides, too: the same bits as for the same numbers in float32."""
    map_dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.bfloat16, torch.float32))
    for (count, normalization), map_dtype in zip(itertools.product((2, 3), NORMALIZATIONS), map_dtypes, strict=False):
        inputs = maps("a bottom-up node", UNEVEN, map_dtype, target.device)[:count]
        spaced = torch.tensor([0.3, 9.0, 1.7, 9.0, -0.4, 9.0], device=target.device).to(dtype)[: 2 * count : 2]
        weights, plain = spaced.detach().requires_grad_(), spaced.float().requires_grad_()
        with target.serves("weighted_merge", "weighted_merge"):
            result, expected = (
                fpn_kernels.weighted_merge(inputs, each, normalization=normalization) for each in (weights, plain)
            )
        assert torch.equal(result, expected)
        grad = random_map(result.shape, map_dtype, target.device)
        with fpn_kernels.use_backend(target.backend):
            (of_weights,) = torch.autograd.grad(result, weights, grad)
            (of_plain,) = torch.autograd.grad(expected, plain, grad)
        # Compared in float32: 8-bit floats know no equality.
        assert of_weights.dtype == dtype and torch.equal(of_weights.float(), of_plain.to(dtype).float())


def test_triton_leaves_two_coarse_maps_to_eager() -> None:
    refusal = triton.BACKEND.implementations["weighted_merge"].refusal
    one, two = (maps(node, UNEVEN, torch.float32) for node in ("a coarse map last", "two coarse maps"))
    assert "two maps to be resized" in str(refusal(*two, fusion_weights(3), "nearest"))
    assert "two maps to be resized" not in str(refusal(*one, fusion_weights(3), "nearest"))


@pytest.mark.gpu
def test_the_weights_are_not_read_by_the_host() -> None:
    inputs = maps("a coarse map last", UNEVEN, torch.float32, "cuda", grad=True)
    weights = fusion_weights(3, "cuda", grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fpn_kernels.weighted_merge(inputs, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weights.grad is not None and weights.grad.isfinite().all()


BAD = {
    "a tensor": (lambda x, w: (x[0], w), {}, TypeError, "inputs: expected a list or tuple of tensors, got Tensor"),
    "one map": (lambda x, w: (x[:1], w[:1]), {}, ValueError, "inputs: expected two or three maps, got 1"),
    "four maps": (lambda x, w: (x * 2, w), {}, ValueError, "inputs: expected two or three maps, got 4"),
    "no tensor": (lambda x, w: ([x[0], 3], w), {}, TypeError, r"inputs\[1\]: expected a tensor, got int"),
    "rank": (lambda x, w: ([x[0], x[1][0]], w), {}, ValueError, r"inputs\[1\]: expected 4 dimensions.*got 3"),
    "channels": (lambda x, w: ([x[0], x[1][:, 1:]], w), {}, ValueError, r"inputs\[1\]: .*\[2, 6, h, w\], got \[2, 5,"),
    "batch": (lambda x, w: ([x[0], x[1][:1]], w), {}, ValueError, r"inputs\[1\]: expected the batch and channels"),
    "no pixels": (
        lambda x, w: ([x[0][:, :, :0], x[1]], w),
        {},
        ValueError,
        r"inputs\[0\]: expected at least one pixel",
    ),
    "integers": (lambda x, w: ([x[0].long(), x[1]], w), {}, TypeError, r"inputs\[0\]: .*float64, got torch.int64"),
    "dtypes": (lambda x, w: ([x[0], x[1].half()], w), {}, TypeError, r"inputs\[1\]: .*inputs\[0\], torch.float32, got"),
    "device": (lambda x, w: ([x[0], x[1].to("meta")], w), {}, ValueError, r"inputs\[1\]: expected the device"),
    "sparse": (lambda x, w: ([x[0], x[1].to_sparse()], w), {}, TypeError, r"inputs\[1\]: expected a dense"),
    "a list of weights": (lambda x, w: (x, [1.0, 1.0]), {}, TypeError, "weights: expected a tensor, got list"),
    "count of weights": (lambda x, w: (x, w[:1]), {}, ValueError, r"weights: expected the shape \[2\].*got \[1\]"),
    "rank of weights": (lambda x, w: (x, w[None]), {}, ValueError, r"weights: expected the shape \[2\].*got \[1, 2\]"),
    "dtype of weights": (lambda x, w: (x, w.long()), {}, TypeError, "weights: expected a floating-point tensor, got"),
    "device of weights": (lambda x, w: (x, w.to("meta")), {}, ValueError, "weights: expected the device of the maps"),
    "normalization": (
        lambda x, w: (x, w),
        {"normalization": "sum"},
        ValueError,
        "normalization: .*'relu', 'softmax', got",
    ),
    "type of normalization": (lambda x, w: (x, w), {"normalization": 1}, ValueError, "normalization: .*got 1"),
    "eps": (lambda x, w: (x, w), {"eps": -1e-9}, ValueError, "eps: expected a finite number of at least 0, got -1e-09"),
    "eps is NaN": (lambda x, w: (x, w), {"eps": float("nan")}, ValueError, "eps: .*got nan"),
    "type of eps": (lambda x, w: (x, w), {"eps": "1e-4"}, TypeError, "eps: expected a number, got str"),
    "mode": (lambda x, w: (x, w), {"mode": "area"}, ValueError, "mode: expected one of 'nearest'.*'area'"),
    "type of mode": (lambda x, w: (x, w), {"mode": None}, TypeError, "mode: expected a string, got NoneType"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, target: Target) -> None:
    make, keywords, error, message = BAD[case]
    inputs = maps("a top-down node", UNEVEN, torch.float32, target.device)
    arguments = make(inputs, fusion_weights(2, target.device))
    with fpn_kernels.use_backend(target.backend), pytest.raises(error, match=message):
        fpn_kernels.weighted_merge(*arguments, **keywords)


def test_bad_arguments_of_the_operators_are_named() -> None:
    x, y = maps("two of one size", UNEVEN, torch.bfloat16)
    operators = torch.ops.fpn_kernels
    with pytest.raises(
        TypeError, match="weights: expected torch.float32, in which .*bfloat16 are summed, got .*bfloat16"
    ):
        operators.weighted_merge(x, y, None, torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"weights: expected the shape \[3\]"):
        operators.weighted_merge(x, y, y, torch.ones(2))
    with pytest.raises(ValueError, match="weights: expected the device of the maps, cpu, got meta"):
        operators.weighted_merge(x, y, None, torch.ones(2, device="meta"))
    for normalization in NORMALIZATIONS:
        with pytest.raises(ValueError, match="weights: expected the device of the maps, cpu, got meta"):
            operators.weighted_merge(x, y, None, torch.ones(2, device="meta"), normalization=normalization)
        with pytest.raises(TypeError, match="weights: expected a floating-point tensor, got torch.int64"):
            operators.weighted_merge(x, y, None, torch.ones(2, dtype=torch.int64), normalization=normalization)
    with pytest.raises(ValueError, match="normalization: expected one of 'relu', 'softmax', 'none', got 'sum'"):
        operators.weighted_merge(x, y, None, torch.ones(2), normalization="sum")
    with pytest.raises(ValueError, match="eps: expected a finite number of at least 0, got -1.0"):
        operators.weighted_merge(x, y, None, torch.ones(2), normalization="relu", eps=-1.0)
    with pytest.raises(ValueError, match=r"input: expected the shape of grad, .*got \[2, 6, 3, 10\]"):
        operators.weighted_merge_backward(x, y[:, :, :3], torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"factor: expected a single number .*\[1\]"):
        operators.weighted_merge_backward(x, y, torch.ones(1))
    with pytest.raises(TypeError, match="factor: expected torch.float32"):
        operators.weighted_merge_backward(x, y, torch.ones((), dtype=torch.float64))
