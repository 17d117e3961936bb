"""`WeightedMerge`, and the operator below it in `torch.compile` and `torch.export`."""

from __future__ import annotations

import oracle
import pytest
import torch
from nodes import (
    NODES,
    NORMALIZATIONS,
    UNEVEN,
    fusion_weights,
    maps,
)
from samples import MERGES, Sizes, random_map
from targets import Target

import fpn_kernels


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("node", ["a top-down node", "a bottom-up node", "a coarse map in the middle"])
def test_compile_with_symbolic_sizes(node: str, target: Target) -> None:
    torch._dynamo.reset()  # the limit of recompilations counts over all tests of this function
    normalization = "relu" if node == "a bottom-up node" else "softmax"
    module = fpn_kernels.WeightedMerge(1 + len(NODES[node]), normalization).to(target.device)
    compiled = torch.compile(lambda x: module(x).relu(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        module.weights.copy_(fusion_weights(len(module.weights), target.device))
    for sizes in target.affordable((MERGES[0], MERGES[5], MERGES[8], MERGES[9])):
        inputs = maps(node, sizes, torch.float32, target.device, grad=True)
        served = ["weighted_merge", "weighted_merge_backward"] + ["upsample_add_backward"] * ("coarse" in NODES[node])
        with target.serves(*served):
            result, expected = compiled(inputs), module(inputs).relu()
            assert torch.equal(result, expected)
            leaves = (*inputs, module.weights)
            pairs = zip(
                torch.autograd.grad(result.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs)


def test_export_keeps_the_operator() -> None:
    module = fpn_kernels.WeightedMerge(2)
    other, first = maps("a top-down node", MERGES[8], torch.float32)[::-1]
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(module, ([first, other],), dynamic_shapes=([{2: height, 3: width}, None],))
    assert any("weighted_merge" in str(node.target) for node in program.graph.nodes)
    larger = random_map((1, 6, 9, 11), torch.float32)
    assert torch.equal(program.module()([larger, other]), module([larger, other]))
