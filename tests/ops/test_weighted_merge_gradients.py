"""The gradients of `weighted_merge`, of maps and of weights, on every backend that is here."""

from __future__ import annotations

import itertools
from typing import Any

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
from samples import MERGES, Sizes, random_map
from targets import Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.backends.selection import record_calls


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("node", NODES)
def test_gradients(node: str, dtype: torch.dtype, target: Target) -> None:
    layouts = itertools.cycle(("nchw", "nhwc", "misaligned", "expanded", "sliced-nhwc"))
    for sizes, mode, layout in zip(target.affordable(MERGES), itertools.cycle(MODES), layouts, strict=False):
        require_node(target, node, sizes, dtype)
        inputs = maps(node, sizes, dtype, target.device, ("nchw", layout, "nhwc"), grad=True)
        weights = fusion_weights(len(inputs), target.device, grad=True)
        grad = random_map(inputs[0].shape, dtype, target.device, layout)
        result = fpn_kernels.weighted_merge(inputs, weights, normalization="softmax", mode=mode)
        resized = [x.shape != result.shape for x in inputs]
        with target.serves("weighted_merge_backward", *["upsample_add_backward"] * any(resized)):
            *gradients, of_weights = torch.autograd.grad(result, (*inputs, weights), grad)

        leaves = [x.detach().double().cpu().requires_grad_() for x in (*inputs, weights)]
        exact = oracle.weighted_merge(leaves[:-1], leaves[-1].softmax(0), mode, dtype)
        *expected, of_leaf = torch.autograd.grad(exact, leaves, grad.double().cpu())
        # The same with absolute values: what each sum has to add up.
        magnitudes = [x.detach().abs().requires_grad_() for x in leaves]
        factors = leaves[-1].detach().softmax(0).requires_grad_()
        largest = oracle.weighted_merge(magnitudes[:-1], factors, mode, dtype)
        *terms, of_factors = torch.autograd.grad(largest, (*magnitudes[:-1], factors), grad.double().cpu().abs())
        for x, got, want, sums, coarse in zip(inputs, gradients, expected, terms, resized, strict=True):
            assert got.dtype == dtype
            # A sum of n numbers one after another is off by n half roundings at most.
            summed = 1 + grad[0, 0].numel() / x[0, 0].numel() / 16
            # A coarse map's is rounded after the adjoint, and again after the factor.
            positions = spread(mode, result.shape[2:]) if coarse else 1
            oracle.within_rounding(got, want, sums * (positions + summed), 1 + coarse)
        # Sums over whole maps: some more roundings in float32, and those of the terms where they are an adjoint's.
        due = 8 * torch.finfo(weights.dtype).eps * spread(mode, result.shape[2:])
        allowed = sum(float(s) * (due + oracle.rounding(dtype) * c) for s, c in zip(of_factors, resized, strict=True))
        assert of_weights.dtype == weights.dtype
        assert float((of_weights.double().cpu() - of_leaf).abs().max()) <= allowed


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_only_the_gradients_asked_for_are_computed(wanted: tuple[bool, ...], target: Target) -> None:
    inputs = maps("a coarse map last", UNEVEN, torch.float32, target.device)
    weights = fusion_weights(3, target.device)
    everything = (*inputs, weights)
    leaves = [x.requires_grad_() for x, wants in zip(everything, wanted, strict=True) if wants]
    grad = random_map(inputs[0].shape, torch.float32, target.device)
    result = fpn_kernels.weighted_merge(inputs, weights)
    operators = set()
    if wanted[3] and any(wanted[:3]):
        operators.add("weighted_merge_backward")
    if wanted[2] or wanted[3]:
        operators.add("upsample_add_backward")
    with fpn_kernels.use_backend(target.backend), record_calls() as calls:
        gradients = torch.autograd.grad(result, leaves, grad)
    assert {operator for operator, _ in calls} == operators
    for x in everything:
        x.requires_grad_()
    with fpn_kernels.use_backend(target.backend):
        whole = torch.autograd.grad(fpn_kernels.weighted_merge(inputs, weights), everything, grad)
    # Alone, a sum over a map may be added up in another order.
    expected = [x for x, wants in zip(whole, wanted, strict=True) if wants]
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0 if got.dim() == 4 else 1e-4)


def test_maps_are_kept_only_for_the_gradient_of_the_weights() -> None:
    inputs = maps("a bottom-up node", UNEVEN, torch.float32, grad=True)
    for wants, kept in ((False, 1), (True, 4)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x), lambda x: x):  # type: ignore[misc]
            torch.ops.fpn_kernels.weighted_merge(*inputs, torch.ones(3).requires_grad_(wants))
        assert len([x for x in saved if x is not None]) == kept


def test_the_backward_repeats_bit_for_bit(target: Target) -> None:
    grad, tensor = (random_map((2, 4, 19, 29), torch.float32, target.device) for _ in range(2))
    factor = torch.tensor(0.3, device=target.device)
    with target.serves("weighted_merge_backward"):
        first, second = (torch.ops.fpn_kernels.weighted_merge_backward(grad, tensor, factor) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(("mode", "normalization"), [*zip(MODES, itertools.cycle(NORMALIZATIONS), strict=False)])
def test_double_backward(mode: str, normalization: str, target: Target) -> None:
    """Gradients of the gradients against the oracle's, in float32."""
    sizes = MERGES[8]
    leaves = [*maps("a coarse map last", sizes, torch.float32, target.device), fusion_weights(3, target.device)]
    leaves.append(random_map(leaves[0].shape, torch.float32, target.device))
    directions = [torch.randn_like(x) for x in leaves[:-1]]

    def second(leaves: list[Tensor], directions: list[Tensor], exact: bool) -> tuple[Tensor, ...]:
        *inputs, weights, grad = (x.detach().requires_grad_() for x in leaves)
        if exact:
            result = oracle.weighted_merge(inputs, exact_factors(weights, normalization), mode, torch.float32)
        else:
            result = fpn_kernels.weighted_merge(inputs, weights, normalization=normalization, mode=mode)
        gradients = torch.autograd.grad(result, (*inputs, weights), grad, create_graph=True)
        return torch.autograd.grad(gradients, (*inputs, weights, grad), directions)

    with fpn_kernels.use_backend(target.backend):
        results = second(leaves, directions, exact=False)
    wide = second([x.double().cpu() for x in leaves], [x.double().cpu() for x in directions], exact=True)
    for result, exact in zip(results, wide, strict=True):
        assert oracle.error(result, exact) <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_weights_at_the_edges_of_the_relu(normalization: str, eps: float, target: Target) -> None:
    """Weights of 0, none above 0, not finite: as PyTorch's autograd differentiates the formula, and does so again."""
    small, nan, inf = Sizes(1, 2, (2, 3), (4, 5), "small"), float("nan"), float("inf")
    cases = ([0.0, 1.0, 2.0], [-1.0, 0.0, -0.0], [3.0, -1.0, 0.5], [nan, 1.0, -1.0], [inf, 1.0, 0.0], [-1.0, 0.0])
    for values in cases:
        inputs = maps("a coarse map last", small, torch.float32, target.device, grad=True)[-len(values) :]
        grad = random_map(inputs[0].shape, torch.float32, target.device)
        weights = torch.tensor(values, device=target.device, requires_grad=True)

        def everything(module: Any, inputs: Any = inputs, grad: Tensor = grad, weights: Tensor = weights) -> Any:
            result = module.weighted_merge(inputs, weights, normalization=normalization, eps=eps)
            gradients = torch.autograd.grad(result, (*inputs, weights), grad, create_graph=True)
            (second,) = torch.autograd.grad(gradients[-1].square().sum() + gradients[0].mean(), weights)
            return result, *gradients, second

        with fpn_kernels.use_backend(target.backend):
            ours = everything(fpn_kernels)
        for got, want in zip(ours, everything(reference), strict=True):
            # A sum over a map rounds with what it adds up, not with what is left of it.
            largest = float(want.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, largest), equal_nan=True)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("node", NODES)
def test_gradcheck(node: str, mode: str, normalization: str, target: Target) -> None:
    target.require(torch.float64)
    inputs = maps(node, Sizes(2, 2, (3, 2), (4, 5), "small"), torch.float64, target.device, grad=True)
    weights = fusion_weights(len(inputs), target.device, torch.float64, grad=True)

    def merge(*tensors: Tensor) -> Tensor:
        return fpn_kernels.weighted_merge(tensors[:-1], tensors[-1], normalization=normalization, mode=mode)

    with fpn_kernels.use_backend(target.backend):
        assert torch.autograd.gradcheck(merge, (*inputs, weights))
        assert torch.autograd.gradgradcheck(merge, (*inputs, weights))
