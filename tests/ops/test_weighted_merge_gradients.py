"""The gradients of `weighted_merge`: every node, and weights at which the normalisation has an edge."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from nodes import NODES, UNEVEN, fusion_weights, maps, require_node
from samples import Sizes, random_map
from targets import INTERPRETED, Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("node", NODES)
def test_gradients(node: str, mode: str, target: Target) -> None:
    for dtype in target.dtypes()[: 2 if INTERPRETED else None]:
        require_node(target, node, UNEVEN, dtype)
        leaves = [*maps(node, UNEVEN, dtype, target.device, ("nchw", "nhwc", "misaligned"), grad=True)]
        leaves.append(fusion_weights(len(leaves), target.device, grad=True))
        grad = random_map(leaves[0].shape, dtype, target.device, "sliced-nhwc")
        options = {"normalization": "softmax", "mode": mode}
        with fpn_kernels.use_backend(target.backend):
            result = fpn_kernels.weighted_merge(leaves[:-1], leaves[-1], **options)
            ours = torch.autograd.grad(result, leaves, grad)
        theirs = torch.autograd.grad(reference.weighted_merge(leaves[:-1], leaves[-1], **options), leaves, grad)
        wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
        exact = oracle.weighted_merge(wide[:-1], oracle.fusion_factors(wide[-1], "softmax"), mode, dtype)
        true = torch.autograd.grad(exact, wide, grad.double().cpu())
        for leaf, mine, other, right in zip(leaves, ours, theirs, true, strict=True):
            assert mine.dtype == leaf.dtype
            # A resized map's gradient is rounded after the adjoint, and again after the factor.
            of = dtype if leaf.shape != grad.shape else None
            assert oracle.no_worse_than_eager(mine, other, right, sum_over_pixels_of=of), dtype


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("normalization", ["relu", "softmax"])
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
            # A sum over a map rounds with its terms, not with its result.
            largest = float(want.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, largest), equal_nan=True)
