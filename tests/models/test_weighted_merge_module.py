"""`WeightedMerge`: the module of a BiFPN node."""

from __future__ import annotations

import oracle
import pytest
import torch
from nodes import UNEVEN, maps
from samples import Sizes
from targets import Target

import fpn_kernels


@pytest.mark.parametrize("normalization", ["relu", "softmax"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_module_starts_as_an_average(count: int, normalization: str, target: Target) -> None:
    module = fpn_kernels.WeightedMerge(count, normalization, eps=0.0).to(target.device)
    assert list(module.state_dict()) == ["weights"]
    assert torch.equal(module.weights.detach().cpu(), torch.ones(count))
    inputs = maps("a bottom-up node", UNEVEN, torch.float32, target.device)[:count]
    with target.serves("weighted_merge"):
        result = module(inputs)
    oracle.within_rounding(result, sum(x.double().cpu() for x in inputs) / count, 10.0)


def test_the_module_learns_which_map_matters(target: Target) -> None:
    """Two maps of which one is the answer: its share goes to one."""
    torch.manual_seed(3)
    module = fpn_kernels.WeightedMerge(2, mode="bilinear").to(target.device)
    first, other = maps("a top-down node", Sizes(1, 3, (2, 3), (4, 5), "few pixels"), torch.float32, target.device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    with fpn_kernels.use_backend(target.backend):
        for _ in range(20):
            loss = (module([first, other]) - first).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 4
    mattering, other_weight = module.weights.tolist()
    assert mattering > 3 * other_weight


def test_bad_options_of_the_module_are_named() -> None:
    for arguments, keywords, error, message in (
        ((1,), {}, ValueError, "num_inputs: expected 2 or 3, got 1"),
        (("2",), {}, ValueError, "num_inputs: expected 2 or 3, got '2'"),
        ((2, "sum"), {}, ValueError, "normalization: expected one of"),
        ((2, "relu", -1.0), {}, ValueError, "eps: expected a finite number"),
        ((2, "relu", None), {}, TypeError, "eps: expected a number"),
        ((2,), {"mode": "area"}, ValueError, "mode: expected one of"),
    ):
        with pytest.raises(error, match=message):
            fpn_kernels.WeightedMerge(*arguments, **keywords)
    assert repr(fpn_kernels.WeightedMerge(3)) == "WeightedMerge(3, normalization='relu', eps=0.0001, mode='nearest')"
