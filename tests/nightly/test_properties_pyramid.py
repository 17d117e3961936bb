"""Any pyramid against float64 and against eager: `top_down_pathway` and `FeaturePyramidNetwork`."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence

import oracle
import pytest
import torch
from targets import Target, parameters
from torch import Tensor, nn
from twins import Twin, group_norm, scramble

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import strategies
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Layout, at_every_level

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators.layouts import requested_format, result_format

Size = tuple[int, int]
Tensors = list[Tensor | None]


def no_worse_than_eager(result: Tensor, eager: Tensor, exact: Tensor, size: Tensor, levels: int) -> None:
    """An error above 1.1 times eager's own is at most some roundings a level, of what the terms come to."""
    assert result.dtype == eager.dtype and torch.isfinite(result).all()
    error, allowed = (float((x.detach().double().cpu() - exact).norm()) for x in (result, eager))
    due = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 8, torch.float64: 32}[result.dtype]
    assert error <= max(1.1 * allowed, levels * due * oracle.rounding(result.dtype) * float(size)), (error, allowed)


def _longer_sums(case: Pathway | Network, dtype: torch.dtype) -> float:
    """What the bound above grows by: a gradient may add up as many numbers as there are pixels.

    Three times the usual error of a sum of so many, see `test_properties_convolutions.py`, which is negligible
    next to the rounding of a 16-bit result.
    """
    if dtype not in (torch.float32, torch.float64):
        return 1.0
    pixels = case.batch * max(height * width for height, width in case.sizes)
    return max(1.0, 3 * (pixels / 6) ** 0.5 / 8)


# -------------------------------------------------------------------------------------------- top_down_pathway


@dataclasses.dataclass(frozen=True)
class Pathway:
    batch: int
    cout: int
    cins: tuple[int, ...]
    sizes: tuple[Size, ...]  # finest first
    biased: tuple[bool, ...]
    used: tuple[bool, ...]  # the levels that have a gradient
    dtype: torch.dtype
    mode: str
    gain: float
    memory_format: torch.memory_format
    layouts: tuple[Layout, ...]  # of the features, then of the gradients
    wanted: tuple[bool, ...]
    seed: int

    @property
    def levels(self) -> int:
        return len(self.sizes)

    def tensors(self, device: str) -> tuple[Tensors, list[Tensor]]:
        """Features, weights and biases (None where there is none), and the gradients of the results."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            return strategies.values(shape, self.dtype, generator, scale).to(device)

        levels = list(zip(self.cins, self.sizes, strict=True))
        features = [draw((self.batch, cin, *size)) for cin, size in levels]
        weights = [draw((self.cout, cin, 1, 1), cin**-0.5) for cin in self.cins]
        biases = [draw((self.cout,)) if biased else None for biased in self.biased]
        grads = [draw((self.batch, self.cout, *size)) for size in self.sizes]
        placed = [layout.place(x) for layout, x in zip(self.layouts, (*features, *grads), strict=True)]
        return [*placed[: self.levels], *weights, *biases], placed[self.levels :]


@st.composite
def pathways(draw: st.DrawFn) -> Pathway:
    finest = draw(strategies.sizes)
    sizes = [finest]
    for _ in range(draw(st.integers(0, 3))):
        halves = ((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2)
        sizes.append(draw(st.one_of(st.just(halves), st.tuples(*[st.integers(1, 12)] * 2))))
    batch, levels = draw(st.integers(1, 2)), len(sizes)
    channels = strategies.counts(16, *sizes, batch=batch)
    return Pathway(
        batch=batch,
        cout=draw(channels),
        cins=tuple(draw(channels) for _ in sizes),
        sizes=tuple(sizes),
        biased=draw(strategies.subsets(levels)),
        used=draw(strategies.subsets(levels).filter(any)),
        dtype=draw(strategies.dtypes),
        mode=draw(strategies.modes),
        gain=draw(strategies.gains),
        memory_format=draw(strategies.formats),
        layouts=draw(st.tuples(*[strategies.layouts] * (2 * levels))),
        wanted=draw(strategies.subsets(3 * levels)),
        seed=draw(strategies.seeds),
    )


def _pathway(module: object, case: Pathway, leaves: Tensors) -> Sequence[Tensor]:
    features, weights, biases = (leaves[i * case.levels : (i + 1) * case.levels] for i in range(3))
    if module is not oracle:
        run = module.top_down_pathway  # type: ignore[attr-defined]
        merged: Sequence[Tensor] = run(
            features, weights, biases, mode=case.mode, gain=case.gain, memory_format=case.memory_format
        )
        return merged
    results: list[Tensor] = []
    for feature, weight, bias in list(zip(features, weights, biases, strict=True))[::-1]:
        assert feature is not None and weight is not None
        lateral = oracle.lateral_connection(feature, weight, bias)
        if results:
            resized = oracle.resize(results[-1], tuple(feature.shape[2:]), case.mode, case.dtype)
            lateral = case.gain * (lateral + resized)
        results.append(lateral)
    return results[::-1]


def _run(module: object, case: Pathway, leaves: Tensors, grads: list[Tensor]) -> tuple[list[Tensor], Tensors]:
    merged = _pathway(module, case, leaves)
    used = [
        (level, grad) for level, grad, use in zip(merged, grads, case.used, strict=True) if use and level.requires_grad
    ]
    required = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(required)
    if used:
        found = torch.autograd.grad([x for x, _ in used], required, [grad for _, grad in used], allow_unused=True)
    rest = iter(found)
    return [x.detach() for x in merged], [
        next(rest) if leaf is not None and leaf.requires_grad else None for leaf in leaves
    ]


def _copies(leaves: Tensors, case: Pathway, power: int = 1) -> Tensors:
    return [
        None if x is None else (x.detach().double().cpu() ** power).requires_grad_(wants)
        for x, wants in zip(leaves, case.wanted, strict=True)
    ]


@pytest.mark.parametrize("target", parameters("lateral_connection"), ids=str)
@given(case=pathways())
def test_top_down_pathway(target: Target, case: Pathway) -> None:
    assume(case.dtype in target.dtypes())
    tensors, grads = case.tensors(target.device)
    before = [None if x is None else x.clone() for x in (*tensors, *grads)]
    leaves: Tensors = [
        None if x is None else x.detach().requires_grad_(wants) for x, wants in zip(tensors, case.wanted, strict=True)
    ]
    computed: list[tuple[list[Tensor], Tensors]] = []
    at_every_level(target, lambda: computed.append(_run(fpn_kernels, case, leaves, grads)) or [])  # type: ignore[func-returns-value]
    eager = _run(reference, case, leaves, grads)
    exact = _run(oracle, case, _copies(leaves, case), [grad.double().cpu() for grad in grads])
    # The sums of the squares of the terms: the size of a sum of random terms.
    squared = dataclasses.replace(case, gain=case.gain**2)
    squares = _run(oracle, squared, _copies(leaves, case, 2), [grad.double().cpu() ** 2 for grad in grads])
    for merged, gradients in computed:
        for feature, level in zip(tensors, merged, strict=False):
            assert feature is not None
            assert level.is_contiguous(memory_format=requested_format(feature, case.memory_format))
        every = zip(
            (*merged, *gradients),
            (*eager[0], *eager[1]),
            (*exact[0], *exact[1]),
            (*squares[0], *squares[1]),
            strict=True,
        )
        for ours, theirs, true, square in every:
            assert (ours is None) == (true is None)
            if ours is not None:
                assert theirs is not None and true is not None and square is not None
                size = torch.maximum(true.norm(), square.sum().sqrt())
                no_worse_than_eager(ours, theirs, true, size * _longer_sums(case, case.dtype), case.levels)
    for tensor, was in zip((*tensors, *grads), before, strict=True):
        assert tensor is None or torch.equal(tensor, was), "an input was written to"


# --------------------------------------------------------------------------------------- FeaturePyramidNetwork

NORMS = {"none": None, "batch": nn.BatchNorm2d, "frozen": fpn_kernels.FrozenBatchNorm2d, "group": group_norm}


@dataclasses.dataclass(frozen=True)
class Network:
    batch: int
    cins: tuple[int, ...]
    sizes: tuple[Size, ...]
    norm: str
    mode: str
    fuse_type: str
    dtype: torch.dtype
    layouts: tuple[Layout, ...]
    as_mapping: bool
    seed: int


@st.composite
def networks(draw: st.DrawFn) -> Network:
    path = draw(pathways())
    levels, fewest = len(path.sizes), min(height * width for height, width in path.sizes)
    return Network(
        batch=path.batch,
        cins=path.cins,
        sizes=path.sizes,
        # The spread of a few numbers may be near zero, and a quotient by it any number.
        norm=draw(st.sampled_from([name for name in NORMS if name != "group" or fewest >= 16])),
        mode=path.mode,
        fuse_type=draw(st.sampled_from(("sum", "avg"))),
        dtype=path.dtype,
        layouts=path.layouts[:levels],
        as_mapping=draw(st.booleans()),
        seed=path.seed,
    )


WIDTH = 8  # `group_norm` has four groups


def _exact(twin: Twin, features: Sequence[Tensor], case: Network) -> list[Tensor]:
    """The twin's own modules in float64, with the pixels that the dtype under test reads."""
    results: list[Tensor] = []
    merged: Tensor | None = None
    for inner, outer, feature in list(zip(twin.inner_blocks, twin.layer_blocks, features, strict=True))[::-1]:
        lateral = inner(feature)
        if merged is not None:
            resized = oracle.resize(merged, tuple(feature.shape[2:]), case.mode, case.dtype)
            lateral = (lateral + resized) * (0.5 if case.fuse_type == "avg" else 1.0)
        merged = lateral
        results.append(outer(merged))
    return results[::-1]


@pytest.mark.parametrize("target", parameters("lateral_connection"), ids=str)
@given(case=networks())
def test_feature_pyramid_network(target: Target, case: Network) -> None:
    assume(case.dtype in target.dtypes())
    torch.manual_seed(case.seed)
    options = {"mode": case.mode, "fuse_type": case.fuse_type}
    norm = NORMS[case.norm]
    network = fpn_kernels.FeaturePyramidNetwork(case.cins, WIDTH, None, norm, **options)
    scramble(network)
    twin, exact_twin = (Twin(list(case.cins), WIDTH, None, norm, **options) for _ in range(2))
    network.to(target.device, case.dtype).eval()
    for other, dtype in ((twin, case.dtype), (exact_twin, torch.float64)):
        # Parameters in the dtype under test: rounding them is no error of the computation.
        other.load_state_dict(network.state_dict(), strict=True)
        other.to(target.device if other is twin else "cpu", dtype).eval()
    exact_twin.load_state_dict({name: value.cpu().double() for name, value in network.state_dict().items()})

    generator = torch.Generator().manual_seed(case.seed)
    features = [
        layout.place(strategies.values((case.batch, cin, *size), case.dtype, generator).to(target.device))
        for layout, cin, size in zip(case.layouts, case.cins, case.sizes, strict=True)
    ]
    grads = [
        strategies.values((case.batch, WIDTH, *size), case.dtype, generator).to(target.device) for size in case.sizes
    ]
    names = [f"level {level}" for level in range(len(features))]

    def ours(features: list[Tensor]) -> list[Tensor]:
        results = network(OrderedDict(zip(names, features, strict=True)) if case.as_mapping else features)
        if case.as_mapping:
            assert isinstance(results, OrderedDict) and list(results) == names
            return list(results.values())
        assert isinstance(results, tuple)
        return list(results)

    computed = at_every_level(target, lambda: _results_and_gradients(ours, network, features, grads))
    eager = _results_and_gradients(
        lambda maps: list(twin(dict(zip(names, maps, strict=True))).values()), twin, features, grads
    )
    exact = _results_and_gradients(
        lambda maps: _exact(exact_twin, maps, case),
        exact_twin,
        [x.double().cpu() for x in features],
        [x.double().cpu() for x in grads],
    )
    levels = len(case.sizes)
    # A gradient that cancels has the rounding of its terms: of the other gradients' size.
    typical = sum(float(x.norm()) ** 2 for x in exact[levels:]) ** 0.5 / len(exact[levels:]) ** 0.5
    for results in computed:
        if case.norm != "group":
            for feature, result in zip(features, results, strict=False):
                assert result.is_contiguous(memory_format=result_format(feature))
        for index, (result, theirs, true) in enumerate(zip(results, eager, exact, strict=True)):
            # Normalised maps and weights: the terms of a sum are as large as the sums of a whole map.
            least = true.numel() ** 0.5 if index < levels else typical
            size = torch.maximum(true.norm(), torch.tensor(least, dtype=torch.float64))
            if index >= levels:
                size = size * _longer_sums(case, case.dtype)
            no_worse_than_eager(result, theirs, true, size, 2 * levels)


def _results_and_gradients(
    run: Callable[[list[Tensor]], list[Tensor]], module: nn.Module, features: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """The maps of the pyramid, then the gradients of the features and of the parameters."""
    leaves = [feature.detach().requires_grad_() for feature in features]
    results = run(leaves)
    gradients = torch.autograd.grad(results, [*leaves, *module.parameters()], grads)
    return [*(result.detach() for result in results), *gradients]
