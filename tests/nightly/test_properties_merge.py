"""Any merge, forward and backward, against float64 and against eager: `upsample_add` and `weighted_merge`."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from nodes import spread
from targets import Target, parameters
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import strategies
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Layout, at_every_level, strides_when_traced

import fpn_kernels
from fpn_kernels import reference, resampling
from fpn_kernels.operators.layouts import result_format

Size = tuple[int, int]


def _eager_reads_the_same(top: Size, fine: Size, mode: str, dtype: torch.dtype, device: str) -> bool:
    axes = zip(top, fine, strict=True)
    if mode == "bilinear":
        return False
    return device == "cuda" or all(resampling.indices_agree(i, o, mode, dtype) for i, o in axes)


def _same_bits(results: list[list[Tensor | None]]) -> None:
    """Every kind of vector instructions computes the same numbers in the same layout."""
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert (ours is None) == (first is None)
            assert ours is None or (torch.equal(ours, first) and ours.stride() == first.stride())


# ----------------------------------------------------------------------------------------------- upsample_add


@dataclasses.dataclass(frozen=True)
class Merge:
    batch: int
    channels: int
    top: Size
    fine: Size
    dtype: torch.dtype
    mode: str
    gain: float
    layouts: tuple[Layout, Layout, Layout]  # of the top, of the lateral, of the gradient
    wanted: tuple[bool, ...]
    seed: int
    scale: float

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.batch, self.channels, *size) for size in (self.top, self.fine, self.fine)]
        top, lateral, grad = (
            layout.place(strategies.values(shape, self.dtype, generator, self.scale).to(device))
            for layout, shape in zip(self.layouts, shapes, strict=True)
        )
        return top, lateral, grad


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    top, fine = draw(strategies.merged_sizes())
    batch = draw(st.integers(1, 3))
    return Merge(
        batch=batch,
        channels=draw(strategies.counts(40, top, fine, batch=batch)),
        top=top,
        fine=fine,
        dtype=draw(strategies.dtypes),
        mode=draw(strategies.modes),
        gain=draw(strategies.gains),
        layouts=draw(st.tuples(*[strategies.layouts] * 3)),
        wanted=draw(strategies.subsets(2)),
        seed=draw(strategies.seeds),
        scale=draw(strategies.scales),
    )


def _adjoint(grad: Tensor, case: Merge) -> Tensor:
    rows, columns = (
        oracle.resize_matrix(i, o, case.mode, case.dtype) for i, o in zip(case.top, case.fine, strict=True)
    )
    return torch.einsum("yh,ncyx,xw->nchw", rows, grad.double().cpu(), columns)


@pytest.mark.parametrize("target", parameters("upsample_add"), ids=str)
@given(case=merges())
def test_upsample_add(target: Target, case: Merge) -> None:
    assume(case.dtype in target.dtypes())
    top, lateral, grad = case.tensors(target.device)
    before = [tensor.clone() for tensor in (top, lateral, grad)]
    leaves = [t.detach().requires_grad_(wants) for t, wants in zip((top, lateral), case.wanted, strict=True)]
    options = {"mode": case.mode, "gain": case.gain}

    def compute() -> list[Tensor | None]:
        result = fpn_kernels.upsample_add(*leaves, **options)
        required = [leaf for leaf in leaves if leaf.requires_grad]
        assert result.requires_grad == bool(required)
        gradients = iter(torch.autograd.grad(result, required, grad) if required else ())
        return [result.detach(), *(next(gradients) if leaf.requires_grad else None for leaf in leaves)]

    results = at_every_level(target, compute)
    _same_bits(results)
    result, grad_top, grad_lateral = results[0]
    assert result is not None
    assert result.dtype == case.dtype and result.is_contiguous(memory_format=result_format(lateral))
    assert result.stride() == strides_when_traced(fpn_kernels.upsample_add, top, lateral, **options)
    exact = oracle.upsample_add(top, lateral, case.mode, case.gain)
    if case.mode != "bilinear" and case.gain == 1.0:
        # The sum of two numbers, rounded once, has one right answer: through float64 it is the same one.
        assert torch.equal(result.cpu(), exact.to(case.dtype))
        if _eager_reads_the_same(case.top, case.fine, case.mode, case.dtype, target.device):
            assert torch.equal(result, reference.upsample_add(top, lateral, mode=case.mode))
    largest = float(top.abs().max() + lateral.abs().max())
    oracle.within_rounding(result, exact, largest * spread(case.mode, case.top))
    if grad_lateral is not None:
        assert torch.equal(grad_lateral, grad if case.gain == 1.0 else grad * case.gain)
    if grad_top is not None:
        assert grad_top.is_contiguous(memory_format=result_format(grad))
        terms = _adjoint(grad.abs(), case) * abs(case.gain)
        if case.mode == "bilinear":
            # Two ways to compute a weight differ by the rounding of the position, also where one of them comes to 0.
            terms = terms.max()
        oracle.within_rounding(grad_top, _adjoint(grad, case) * case.gain, terms * max(8, *case.fine, *case.top))
    for tensor, was in zip((top, lateral, grad), before, strict=True):
        assert torch.equal(tensor, was), "an input was written to"


# ---------------------------------------------------------------------------------------------- weighted_merge


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a BiFPN: two or three maps, the first of which gives the size."""

    batch: int
    channels: int
    sizes: tuple[Size, ...]
    dtype: torch.dtype
    mode: str
    normalization: str
    layouts: tuple[Layout, ...]  # of the maps, and of the gradient
    weights: tuple[float, ...]
    weight_dtype: torch.dtype
    wanted: tuple[bool, ...]
    seed: int
    scale: float

    def tensors(self, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        *maps, grad = (
            layout.place(
                strategies.values((self.batch, self.channels, *size), self.dtype, generator, self.scale).to(device)
            )
            for layout, size in zip(self.layouts, (*self.sizes, self.sizes[0]), strict=True)
        )
        return maps, torch.tensor(self.weights, dtype=self.weight_dtype, device=device), grad


@st.composite
def nodes(draw: st.DrawFn, most_resized: int) -> Node:
    first, coarse = draw(strategies.merged_sizes())[::-1]
    others = [draw(st.sampled_from((first, coarse)))]
    if draw(st.booleans()):
        resized = sum(size != first for size in others)
        others.append(draw(st.sampled_from((first, coarse, (1, 1)))) if resized < most_resized else first)
    every = (first, *others)
    batch = draw(st.integers(1, 2))
    weight = st.sampled_from((0.0, -0.4, 0.7, 1.0, 1.9, 2.0**-20, 30.0))
    return Node(
        batch=batch,
        channels=draw(strategies.counts(40, *every, batch=batch)),
        sizes=every,
        dtype=draw(strategies.dtypes),
        mode=draw(strategies.modes),
        normalization=draw(st.sampled_from(("relu", "softmax"))),
        layouts=draw(st.tuples(*[strategies.layouts] * (len(every) + 1))),
        weights=draw(st.tuples(*[weight] * len(every))),
        weight_dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float64))),
        wanted=draw(strategies.subsets(len(every) + 1)),
        seed=draw(strategies.seeds),
        scale=draw(strategies.scales),
    )


def _factors(weights: Tensor, normalization: str) -> Tensor:
    """The paper's formulas; the derivative of the ReLU at 0 is 0, as in PyTorch."""
    kept = weights.relu() if normalization == "relu" else weights.exp()
    return kept / (kept.sum() + (1e-4 if normalization == "relu" else 0))


@pytest.mark.parametrize("target", parameters("weighted_merge"), ids=str)
@given(data=st.data())
def test_weighted_merge(target: Target, data: st.DataObject) -> None:
    # Triton leaves two maps to be resized to eager.
    case = data.draw(nodes(most_resized=1 if target.backend == "triton" else 2))
    assume(case.dtype in target.dtypes())
    maps, weights, grad = case.tensors(target.device)

    before = [tensor.clone() for tensor in (*maps, weights, grad)]
    leaves = [t.detach().requires_grad_(wants) for t, wants in zip((*maps, weights), case.wanted, strict=True)]

    def compute() -> list[Tensor | None]:
        *inputs, factors = leaves
        result = fpn_kernels.weighted_merge(inputs, factors, normalization=case.normalization, mode=case.mode)
        required = [leaf for leaf in leaves if leaf.requires_grad]
        assert result.requires_grad == bool(required)
        gradients = iter(torch.autograd.grad(result, required, grad) if required else ())
        return [result.detach(), *(next(gradients) if leaf.requires_grad else None for leaf in leaves)]

    results = at_every_level(target, compute)
    _same_bits(results)
    result, *gradients, of_weights = results[0]
    assert result is not None
    assert result.dtype == case.dtype and result.is_contiguous(memory_format=result_format(maps[0]))

    exact_leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    factors = _factors(exact_leaves[-1], case.normalization)
    exact = oracle.weighted_merge(exact_leaves[:-1], factors, case.mode, case.dtype)
    positions = spread(case.mode, *case.sizes)
    largest = sum(float(x.abs().max()) for x in maps)
    oracle.within_rounding(result, exact.detach(), largest * positions)
    sizes_agree = all(
        _eager_reads_the_same(size, case.sizes[0], case.mode, case.dtype, target.device) for size in case.sizes
    )
    wide = case.dtype in (torch.float32, torch.float64)
    if wide and case.dtype == case.weight_dtype and sizes_agree:
        eager = reference.weighted_merge(maps, weights, normalization=case.normalization, mode=case.mode)
        assert torch.equal(result, eager)

    *expected, of_leaf = torch.autograd.grad(exact, exact_leaves, grad.double().cpu())
    magnitudes = [x.detach().abs().requires_grad_() for x in exact_leaves[:-1]]
    absolute_factors = factors.detach().requires_grad_()
    absolute = oracle.weighted_merge(magnitudes, absolute_factors, case.mode, case.dtype)
    *terms, of_factors = torch.autograd.grad(absolute, (*magnitudes, absolute_factors), grad.double().cpu().abs())
    for x, got, want, sums in zip(maps, gradients, expected, terms, strict=True):
        if got is not None:
            assert got.dtype == case.dtype
            resized = x.shape != result.shape
            # A sum of n numbers one after another is off by n half roundings at most.
            summed = 1 + grad[0, 0].numel() / x[0, 0].numel() / 16
            # A coarse map's is rounded after the adjoint, and again after the factor.
            weighed = sums.max() if case.mode == "bilinear" else sums
            oracle.within_rounding(got, want, weighed * (positions * resized + summed), 1 + resized)
    if of_weights is not None:
        assert of_weights.dtype == case.weight_dtype
        _check_of_weights(case, of_weights, of_leaf, of_factors, factors.detach())
    for tensor, was in zip((*maps, weights, grad), before, strict=True):
        assert torch.equal(tensor, was), "an input was written to"


def _check_of_weights(case: Node, got: Tensor, want: Tensor, of_factors: Tensor, factors: Tensor) -> None:
    """Sums over whole maps, of terms that are rounded where they are an adjoint's, through the normalisation."""
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    due = 8 * eps * spread(case.mode, *case.sizes)
    resized = torch.tensor([size != case.sizes[0] for size in case.sizes])
    errors = of_factors * (due + oracle.rounding(case.dtype) * resized)
    # d factor_i / d weight_j is at most 1 / (the sum that the weights are divided by), in softmax at most 1.
    kept = torch.tensor(case.weights, dtype=torch.float64).clamp(min=0).sum() + 1e-4
    steepest = 1.0 if case.normalization == "softmax" else float(1 / kept)
    allowed = steepest * float(errors.sum()) + oracle.rounding(case.weight_dtype) * want.abs()
    assert (got.double().cpu() - want).abs().le(allowed).all(), (got, want, allowed)
