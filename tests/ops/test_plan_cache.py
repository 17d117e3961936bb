"""The plan cache: a cached plan serves only calls with equal metadata and settings."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import random_map
from targets import Target
from torch import Tensor

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators import dispatch, plan_cache
from fpn_kernels.operators.dispatch import Implementation
from fpn_kernels.operators.upsample_add import UPSAMPLE_ADD
from fpn_kernels.operators.upsample_add.call import UpsampleAdd


class _Counting:
    """A backend of first choice that counts its calls; each plan returns maps of its own number."""

    def __init__(self) -> None:
        self.refusals = self.planned = self.computed = 0
        self.transient = False

    def refusal(self, call: UpsampleAdd) -> str | None:
        self.refusals += 1
        return "no float64" if call.top.dtype == torch.float64 else None

    def plan(self, call: UpsampleAdd) -> Callable[[UpsampleAdd], Tensor]:
        self.planned += 1
        number = float(self.planned)

        def run(call: UpsampleAdd) -> Tensor:
            self.computed += 1
            return torch.full_like(call.lateral, number)

        run.transient = self.transient  # type: ignore[attr-defined]
        return run


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> _Counting:
    backend = _Counting()
    monkeypatch.setattr(dispatch, "BACKENDS", {"counting": lambda: None, **dispatch.BACKENDS})
    monkeypatch.setitem(UPSAMPLE_ADD.backends, "counting", Implementation(backend.plan, backend.refusal))
    return backend


def _maps(**options: Any) -> tuple[Tensor, Tensor]:
    return random_map((1, 4, 3, 4), torch.float32, **options), random_map((1, 4, 6, 8), torch.float32, **options)


def test_equal_calls_are_checked_and_planned_once(counting: _Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[UpsampleAdd] = []
    check = UpsampleAdd.check
    monkeypatch.setattr(UpsampleAdd, "check", lambda call: (checks.append(call), check(call))[1])
    for _ in range(3):
        assert fpn_kernels.upsample_add(*_maps()).unique().tolist() == [1.0]
    assert (counting.refusals, counting.planned, counting.computed, len(checks)) == (1, 1, 3, 1)


def _other_size(top: Tensor, lateral: Tensor) -> tuple[Tensor, Tensor]:
    return top, random_map((1, 4, 6, 9), torch.float32)


def _other_strides(top: Tensor, lateral: Tensor) -> tuple[Tensor, Tensor]:
    return top, lateral.contiguous(memory_format=torch.channels_last)


def _other_alignment(top: Tensor, lateral: Tensor) -> tuple[Tensor, Tensor]:
    return top, torch.randn(lateral.numel() + 1)[1:].view_as(lateral)


def _other_dtype(top: Tensor, lateral: Tensor) -> tuple[Tensor, Tensor]:
    return top.half(), lateral.half()


@pytest.mark.parametrize("other", [_other_size, _other_strides, _other_alignment, _other_dtype])
def test_a_tensor_that_differs_has_a_plan_of_its_own(
    other: Callable[..., tuple[Tensor, Tensor]], counting: _Counting
) -> None:
    maps = _maps()
    assert fpn_kernels.upsample_add(*maps).unique().tolist() == [1.0]
    assert fpn_kernels.upsample_add(*other(*maps)).unique().tolist() == [2.0]
    assert fpn_kernels.upsample_add(*maps).unique().tolist() == [1.0]


def test_an_option_that_differs_has_a_plan_of_its_own(counting: _Counting) -> None:
    top, lateral = _maps()
    for number, options in enumerate(({}, {"mode": "bilinear"}, {"gain": 0.5}), start=1):
        assert fpn_kernels.upsample_add(top, lateral, **options).unique().tolist() == [number]


def test_a_forced_backend_is_part_of_the_key(counting: _Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    top, lateral = _maps()
    exact = reference.upsample_add(top, lateral)
    assert fpn_kernels.upsample_add(top, lateral).unique().tolist() == [1.0]
    with fpn_kernels.use_backend("eager"):
        assert torch.equal(fpn_kernels.upsample_add(top, lateral), exact)
    assert fpn_kernels.upsample_add(top, lateral).unique().tolist() == [1.0]
    monkeypatch.setenv("FPN_KERNELS_BACKEND", "eager")
    assert torch.equal(fpn_kernels.upsample_add(top, lateral), exact)
    monkeypatch.delenv("FPN_KERNELS_BACKEND")
    assert fpn_kernels.upsample_add(top, lateral).unique().tolist() == [1.0]


def test_a_wrong_call_after_a_right_one_raises_each_time(counting: _Counting) -> None:
    top, lateral = _maps()
    fpn_kernels.upsample_add(top, lateral)
    for _ in range(2):
        with pytest.raises(ValueError, match="top: expected the batch and channels of lateral"):
            fpn_kernels.upsample_add(top[:, :3], lateral)
        with pytest.raises(TypeError, match="top: expected the dtype of lateral"):
            fpn_kernels.upsample_add(top.half(), lateral)
        with pytest.raises(TypeError, match="layout torch.sparse_coo"):
            fpn_kernels.upsample_add(top.to_sparse(), lateral)
    with fpn_kernels.use_backend("counting"), pytest.raises(ValueError, match="no float64"):
        fpn_kernels.upsample_add(top.double(), lateral.double())


def test_explaining_neither_reads_nor_fills_the_cache(counting: _Counting) -> None:
    top, lateral = _maps()
    assert fpn_kernels.explain("upsample_add", top, lateral).backend == "counting"
    fpn_kernels.upsample_add(top, lateral)
    assert fpn_kernels.explain("upsample_add", top, lateral).backend == "counting"
    assert (counting.planned, counting.refusals, counting.computed) == (3, 3, 1)


def test_a_recorded_call_is_one_each_time(counting: _Counting) -> None:
    with dispatch.record_calls() as calls:
        for _ in range(2):
            fpn_kernels.upsample_add(*_maps())
    assert calls == [("upsample_add", "counting")] * 2


def test_a_transient_plan_is_not_cached(counting: _Counting) -> None:
    counting.transient = True
    for number in (1.0, 2.0):
        assert fpn_kernels.upsample_add(*_maps()).unique().tolist() == [number]


# ---------------------------------------------------------------------------------------- the calls of one formula


def _sequenced(key: object) -> list[Tensor]:
    with plan_cache.Sequenced((key,)):
        return [fpn_kernels.upsample_add(*_maps()), fpn_kernels.upsample_add(*_maps(layout="nhwc"))]


def test_plans_of_a_formula_are_found_by_position(counting: _Counting) -> None:
    numbers = [[each.unique().item() for each in _sequenced("a")] for _ in range(3)]
    assert numbers == [[1.0, 2.0]] * 3 and (counting.planned, counting.computed) == (2, 6)
    plan_cache.clear()
    assert [each.unique().item() for each in _sequenced("a")] == [3.0, 4.0]
    # Outside, and under another key, each plan is found by its own key.
    assert fpn_kernels.upsample_add(*_maps(layout="nhwc")).unique().item() == 4.0
    assert [each.unique().item() for each in _sequenced("b")] == [3.0, 4.0]


def test_a_formula_with_a_transient_plan_is_not_cached(counting: _Counting) -> None:
    counting.transient = True
    for expected in ([1.0, 2.0], [3.0, 4.0]):
        assert [each.unique().item() for each in _sequenced("a")] == expected


def test_a_formula_that_failed_is_not_cached(counting: _Counting) -> None:
    top, lateral = _maps()
    for _ in range(2):
        with pytest.raises(ValueError, match="mode"), plan_cache.Sequenced(("a",)):
            fpn_kernels.upsample_add(top, lateral)
            torch.ops.fpn_kernels.upsample_add(top, lateral, mode="cubic")
    with plan_cache.Sequenced(("a",)):
        fpn_kernels.upsample_add(top, lateral)
    assert plan_cache.get(("a",)) is not None and counting.planned == 1


def test_a_call_in_the_place_of_another_is_an_error() -> None:
    top, lateral = _maps()
    with plan_cache.Sequenced(("a",)):
        fpn_kernels.upsample_add(top, lateral)
    with pytest.raises(AssertionError, match="output_conv> in the place of upsample_add"), plan_cache.Sequenced(("a",)):
        fpn_kernels.output_conv(lateral, torch.ones(4, 4, 3, 3))
    assert torch.equal(fpn_kernels.upsample_add(top, lateral), reference.upsample_add(top, lateral))


def test_other_threads_have_their_own_sequence(counting: _Counting) -> None:
    """Autograd runs the formulas of several devices at once."""
    with plan_cache.Sequenced(("a",)):
        fpn_kernels.upsample_add(*_maps())
        thread = threading.Thread(target=lambda: [fpn_kernels.upsample_add(*_maps()) for _ in range(3)])
        thread.start()
        thread.join()
    assert [each.operator for each in plan_cache.get(("a",))] == ["upsample_add"]


def _pathway_gradients(
    grads: list[Tensor | None], wanted: tuple[bool, bool, bool] = (True, True, True), **options: Any
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    groups = [
        [values(2, 3, 8, 6), values(2, 5, 4, 3), values(2, 2, 2, 2)],
        [values(4, channels, 1, 1) for channels in (3, 5, 2)],
        [values(4) for _ in range(3)],
    ]
    leaves = [t.requires_grad_() for group, wants in zip(groups, wanted, strict=True) if wants for t in group]
    merged = fpn_kernels.top_down_pathway(*groups, **options)
    used = [(m, g) for m, g in zip(merged, grads, strict=True) if g is not None]
    return list(torch.autograd.grad([m for m, _ in used], leaves, [g for _, g in used], allow_unused=True))


def test_the_cached_plans_of_a_backward_serve_only_equal_ones() -> None:
    """Each case in turn, twice, equals its result with an empty cache."""
    nchw = [torch.randn(2, 4, *size) for size in ((8, 6), (4, 3), (2, 2))]
    nhwc = [grad.contiguous(memory_format=torch.channels_last) for grad in nchw]
    cases: list[Callable[[], list[Tensor | None]]] = [
        lambda: _pathway_gradients(nchw),
        lambda: _pathway_gradients(nhwc),
        lambda: _pathway_gradients([nchw[0], nhwc[1], nchw[2]]),
        lambda: _pathway_gradients([None, nchw[1], nchw[2]]),
        lambda: _pathway_gradients([nchw[0], None, nchw[2]]),
        lambda: _pathway_gradients([nchw[0], None, None]),
        lambda: _pathway_gradients(nchw, (True, False, False)),
        lambda: _pathway_gradients(nchw, (False, True, False)),
        lambda: _pathway_gradients(nchw, (False, False, True)),
        lambda: _pathway_gradients(nchw, gain=0.5),
        lambda: _pathway_gradients(nchw, mode="bilinear"),
    ]
    alone = []
    for case in cases:
        plan_cache.clear()
        alone.append(case())
    plan_cache.clear()
    for case, expected in [*zip(cases, alone, strict=True)] * 2:
        for ours, theirs in zip(case(), expected, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_backward_with_create_graph_is_not_sequenced() -> None:
    """With create_graph its calls are differentiable ones."""
    top, lateral = (each.requires_grad_() for each in _maps())
    weight = torch.ones(4, 4, 1, 1)
    for create_graph in (False, True, False, True):
        merged = fpn_kernels.top_down_pathway([lateral, top], [weight, weight])
        gradients = torch.autograd.grad((merged[0] ** 2).sum(), (lateral, top), create_graph=create_graph)
        assert all(gradient.requires_grad == create_graph for gradient in gradients)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "_MAX_PLANS", 5)
    top = torch.randn(1, 2, 2, 2)
    for width in range(2, 20):
        lateral = torch.randn(1, 2, 3, width)
        assert torch.equal(fpn_kernels.upsample_add(top, lateral), reference.upsample_add(top, lateral))
        assert len(plan_cache._plans) <= 5


def test_cached_plans_keep_no_tensor() -> None:
    def call() -> list[weakref.ref[Tensor]]:
        top, lateral = _maps()
        weight, bias, taps = torch.randn(4, 4, 1, 1), torch.randn(4), torch.randn(4, 4, 3, 3)
        fpn_kernels.upsample_add(top, lateral)
        fpn_kernels.lateral_connection(lateral, weight, bias, top)
        fpn_kernels.lateral_connection(lateral, weight)
        fpn_kernels.output_conv(lateral, taps, bias)
        fpn_kernels.top_down_pathway([lateral, top], [weight, weight], [bias, None])
        factors = torch.rand(2)
        fpn_kernels.weighted_merge([lateral, top], factors)
        return [weakref.ref(tensor) for tensor in (top, lateral, weight, bias, taps, factors)]

    references = call()
    gc.collect()
    assert len(plan_cache._plans) >= 6
    assert not [reference for reference in references if reference() is not None]


def test_results_repeat_on_every_backend(target: Target) -> None:
    """A plan computes with the tensors, and the gain, of the call that it serves."""
    device = torch.device(target.device)
    # On a GPU float32 products may be in TF32, with ten bits.
    tolerance = 1e-5 if device.type == "cpu" else 1e-2
    with fpn_kernels.use_backend(target.backend):
        for gain in (1.0, 0.5, 0.5):
            top, lateral = (each.to(device) for each in _maps())
            weight, bias = torch.randn(4, 4, 1, 1, device=device), torch.randn(4, device=device)
            for ours, theirs in (
                (
                    fpn_kernels.upsample_add(top, lateral, gain=gain),
                    reference.upsample_add(top, lateral, gain=gain),
                ),
                (
                    fpn_kernels.lateral_connection(lateral, weight, bias, top, gain=gain),
                    reference.lateral_connection(lateral, weight, bias, top, gain=gain),
                ),
                (
                    fpn_kernels.top_down_pathway([lateral, top], [weight, weight], [None, bias], gain=gain)[0],
                    reference.top_down_pathway([lateral, top], [weight, weight], [None, bias], gain=gain)[0],
                ),
            ):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_pathway_is_planned_once_and_checked_whole() -> None:
    features = [torch.randn(1, 3, 4, 4), torch.randn(1, 5, 2, 2)]
    weights = [torch.randn(2, 3), torch.randn(2, 5, 1, 1)]
    first = fpn_kernels.top_down_pathway(features, weights)
    plans = len(plan_cache._plans)
    for mine, again in zip(first, fpn_kernels.top_down_pathway(features, weights), strict=True):
        assert torch.equal(mine, again)
    assert len(plan_cache._plans) == plans
    with pytest.raises(ValueError, match=r"weights\[1\]: expected the shape \[Cout, 5, 1, 1\]"):
        fpn_kernels.top_down_pathway(features, [weights[0], torch.randn(2, 4)])
    # Equal tensors in another structure: the bias belongs to another level.
    bias = torch.randn(2)
    lower = fpn_kernels.top_down_pathway(features, weights, [bias, None])
    upper = fpn_kernels.top_down_pathway(features, weights, [None, bias])
    torch.testing.assert_close(lower[0], first[0] + bias.view(1, 2, 1, 1))
    torch.testing.assert_close(upper[1], first[1] + bias.view(1, 2, 1, 1))
    torch.testing.assert_close(lower[1], first[1])


def test_a_valid_call_does_not_validate_another(target: Target) -> None:
    """A weight `[8, 4, 3, 3]` is no 1x1 weight of 36 channels, although its matrix has the same shape."""
    feature, taps = random_map((1, 36, 5, 6), torch.float32, target.device), torch.randn(8, 4, 3, 3)
    taps = taps.to(target.device)
    with fpn_kernels.use_backend(target.backend):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"weight: expected the shape \[Cout, 36, 1, 1\] or \[Cout, 36\]"):
                fpn_kernels.lateral_connection(feature, taps)
            fpn_kernels.lateral_connection(feature, taps.flatten(1))
