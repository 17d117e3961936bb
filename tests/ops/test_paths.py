"""Paths: a call bypasses the dispatcher only where the dispatcher would do nothing, with the same autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators import paths
from fpn_kernels.operators.paths import CAST, DISPATCHED, KERNEL, RECORDED, STANDARD, path_of


def _maps() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 4, 3, 4), torch.randn(1, 4, 6, 8)


def test_the_paths() -> None:
    top, lateral = _maps()
    weight = torch.nn.Parameter(torch.randn(4, 4))
    assert path_of(top, lateral) == path_of(lateral, None, top) == KERNEL
    assert path_of(lateral, weight, None) == RECORDED
    with torch.no_grad():
        assert path_of(lateral, weight) == KERNEL
    with torch.inference_mode():
        assert path_of(lateral, weight) == path_of(torch.randn(2)) == KERNEL
    assert path_of(torch.randn(2)) == KERNEL
    with torch.autocast("cpu", torch.bfloat16):
        assert (path_of(top, lateral), path_of(lateral, weight)) == (CAST["cpu"][KERNEL], CAST["cpu"][RECORDED])
        with torch.no_grad():
            assert path_of(lateral, weight) == CAST["cpu"][KERNEL]
        with torch.autocast("cpu", enabled=False):
            assert path_of(lateral, weight) == RECORDED
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        assert path_of(top, lateral) == KERNEL


class _Subclass(Tensor):
    pass


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _profile() -> torch.profiler.profile:
    # Without `acc_events`, torch 2.11 warns of events that it drops.
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)


@contextlib.contextmanager
def _profiled() -> Iterator[None]:
    with _profile():
        yield


@contextlib.contextmanager
def _dual() -> Iterator[None]:
    with torch.autograd.forward_ad.dual_level():
        yield


@pytest.mark.parametrize(
    "context",
    [_FunctionMode, _DispatchMode, _profiled, _dual],
    ids=["function-mode", "dispatch-mode", "profiler", "forward-ad"],
)
def test_an_observer_gets_the_dispatcher_or_standard_operators(
    context: Callable[[], contextlib.AbstractContextManager[object]],
) -> None:
    top, lateral = _maps()
    with context():
        assert path_of(top, lateral) in (DISPATCHED, STANDARD)
    assert path_of(top, lateral) == KERNEL


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.as_subclass(_Subclass),
        torch._neg_view,
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: torch._efficientzerotensor(t.shape),
        lambda t: torch.nested.nested_tensor([t[0], t[0]]),
    ],
    ids=["subclass", "negative-view", "meta", "sparse", "zero-tensor", "nested"],
)
def test_tensors_that_are_not_plain_are_dispatched(make: Callable[[Tensor], Tensor]) -> None:
    top, lateral = _maps()
    assert path_of(make(top), lateral) == path_of(lateral, make(top)) == DISPATCHED


def test_a_negative_view_is_read_with_its_sign() -> None:
    top, lateral = _maps()
    merged = fpn_kernels.upsample_add(torch._neg_view(top), lateral)
    assert torch.equal(merged, reference.upsample_add(-top, lateral))


def test_transforms_see_the_call() -> None:
    seen_paths: list[str] = []

    def seen(top: Tensor) -> Tensor:
        seen_paths.append(path_of(top))
        return top.sum()

    top = torch.randn(2, 4, 3, 4)
    torch.func.vmap(seen)(top)
    torch.func.grad(seen)(top)
    torch.fx.experimental.proxy_tensor.make_fx(seen)(top)
    torch.jit.trace(seen, (top,), check_trace=False)
    assert {*seen_paths} <= {DISPATCHED, STANDARD} and len(seen_paths) == 4


def test_a_profile_names_the_operator() -> None:
    top, lateral = _maps()
    fpn_kernels.upsample_add(top, lateral)
    with _profile() as profile:
        fpn_kernels.upsample_add(top, lateral)
    assert "fpn_kernels::upsample_add" in {event.name for event in profile.events()}


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


MAPS = ((1, 3, 2, 3), (1, 3, 4, 5))
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Any]]] = {
    "upsample_add": (MAPS, lambda t, f: fpn_kernels.upsample_add(t, f, gain=0.7)),
    "lateral_connection": (
        (*MAPS, (3, 3, 1, 1), (3,)),
        lambda t, f, w, b: fpn_kernels.lateral_connection(f, w, b, t, gain=0.7),
    ),
    "lateral_connection-alone": ((MAPS[1], (2, 3)), lambda f, w: fpn_kernels.lateral_connection(f, w)),
    "output_conv": ((MAPS[1], (2, 3, 3, 3), (2,)), fpn_kernels.output_conv),
    "weighted_merge": ((*MAPS, (2,)), lambda t, f, w: fpn_kernels.weighted_merge([f, t], w.abs() + 0.1)),
    "top_down_pathway": (
        (*MAPS, (2, 3), (2, 3, 1, 1), (2,)),
        lambda t, f, w, v, b: fpn_kernels.top_down_pathway([f, t], [w, v], [None, b], gain=0.7),
    ),
    "top_down_pathway-without-biases": (
        (*MAPS, (2, 3), (2, 3, 1, 1)),
        lambda t, f, w, v: fpn_kernels.top_down_pathway([f, t], [w, v]),
    ),
    "output_conv_levels": (
        (*MAPS, (2, 3, 3, 3), (2, 3, 3, 3), (2,)),
        lambda t, f, w, v, b: fpn_kernels.functional.output_conv_levels([f, t], [w, v], [None, b]),
    ),
    "reorder": ((MAPS[1],), lambda f: fpn_kernels.functional.reorder(f, torch.channels_last)),
}


def _sum(result: Any) -> Tensor:
    results = result if isinstance(result, (list, tuple)) else [result]
    return sum(((each**3).sum() for each in results), start=results[0].new_zeros(()))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, call = CASES[name]
    leaves = _leaves(*shapes)

    def derivatives() -> list[Tensor]:
        first = torch.autograd.grad(_sum(call(*leaves)), leaves, create_graph=True)
        second = torch.autograd.grad(sum((each**2).sum() for each in first), leaves, allow_unused=True)
        return [each for each in (*first, *second) if each is not None]

    bypassing = derivatives()
    monkeypatch.setattr(paths, "_bypass", lambda tensors: None)
    dispatched = derivatives()
    assert len(bypassing) == len(dispatched) > len(leaves)
    for mine, theirs in zip(bypassing, dispatched, strict=True):
        assert oracle.error(mine, theirs) <= 1e-14


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("wants", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("name", CASES)
def test_autocast_equals_that_of_the_dispatcher(
    name: str, wants: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; the first tensor has the autocast dtype already, and float64 is not cast."""
    if backend not in fpn_kernels.available_backends():
        pytest.skip(f"{backend} is not here")
    shapes, call = CASES[name]
    dtype = torch.float64 if name == "upsample_add" else torch.float32
    leaves = [leaf.detach().to(dtype) for leaf in _leaves(*shapes)]
    if dtype == torch.float32 and name != "weighted_merge":
        leaves[0] = leaves[0].bfloat16()
    leaves = [leaf.requires_grad_(wants) for leaf in leaves]

    def results() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16), fpn_kernels.use_backend(backend):
            result = call(*leaves)
        results = list(result) if isinstance(result, tuple) else [result]
        with fpn_kernels.use_backend(backend):
            return results + (list(torch.autograd.grad(_sum(result), leaves)) if wants else [])

    bypassing = results()
    monkeypatch.setattr(paths, "_bypass", lambda tensors: None)
    dispatched = results()
    assert bypassing[0].dtype == (torch.bfloat16 if dtype == torch.float32 and name != "reorder" else leaves[0].dtype)
    for mine, theirs in zip(bypassing, dispatched, strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs)


def test_a_backward_inside_the_autocast_region() -> None:
    """As in some training loops."""
    shapes, call = CASES["top_down_pathway"]
    leaves = [leaf.detach().float().requires_grad_() for leaf in _leaves(*shapes)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(_sum(call(*leaves)), leaves)
        total = _sum(call(*leaves))
    outside = torch.autograd.grad(total, leaves)
    for mine, theirs in zip(inside, outside, strict=True):
        assert mine.dtype == torch.float32
        assert oracle.error(mine, theirs.double()) <= 4 * oracle.rounding(torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives(name: str) -> None:
    shapes, call = CASES[name]
    leaves = _leaves(*shapes)
    assert path_of(*leaves) == RECORDED
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", CASES)
def test_one_gradient_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, call = CASES[name]
    values = [leaf.detach() for leaf in _leaves(*shapes)]
    for wanted in range(len(values)):
        inputs = [value.clone().requires_grad_(place == wanted) for place, value in enumerate(values)]
        (mine,) = torch.autograd.grad(_sum(call(*inputs)), inputs[wanted])
        with monkeypatch.context() as patch:
            patch.setattr(paths, "_bypass", lambda tensors: None)
            (theirs,) = torch.autograd.grad(_sum(call(*inputs)), inputs[wanted])
        assert oracle.error(mine, theirs) <= 1e-14


def test_the_same_graph_twice() -> None:
    """A backward does not change what autograd saved."""
    shapes, call = CASES["top_down_pathway"]
    leaves = _leaves(*shapes)
    total = _sum(call(*leaves))
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(total, leaves), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def test_a_torch_without_these_functions_gets_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_dispatch_keys")
    assert paths._make_bypass()(_maps()) is None
