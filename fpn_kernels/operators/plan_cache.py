"""The plan cache: calls with equal metadata are validated, dispatched and planned once.

Validation, dispatch and planning read nothing of a tensor that is not in its cache key.  Per call they took 8 us, and
50 us for a Triton kernel (one core of an Intel Xeon, where eager PyTorch takes 15 us for a small convolution, resize
and addition); on a GPU, nothing is launched in that time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, or_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpn_kernels.operators import dispatch

if TYPE_CHECKING:
    from fpn_kernels.operators.operator import Operator

# As `gpu.geometry` requires of an address.
_ALIGNED_BYTES = 16
_PROPERTIES = attrgetter("shape", "dtype", "device")

Key = tuple[Any, ...]

_plans: dict[Key, Any] = {}
# A program with new shapes in every call clears the cache from time to time.
_MAX_PLANS = 4096


class Plan:
    """A function of a call, for all calls with one cache key.

    Attributes:
        operator: the operator's name.
        backend: the name of the backend that serves the call; None for an empty call or a composition.
        run: takes the call, returns its result.  It keeps no tensor of the call that it was made for.
    """

    __slots__ = ("backend", "operator", "run")

    def __init__(self, operator: str, backend: str | None, run: Callable[[Any], Any]) -> None:
        self.operator, self.backend, self.run = operator, backend, run

    def __call__(self, call: Any) -> Any:
        if dispatch.records and self.backend is not None:
            dispatch.record(self.operator, self.backend)
        return self.run(call)

    @property
    def transient(self) -> bool:
        """Whether the plan holds for this call alone, e.g. because a measurement was put off."""
        return getattr(self.run, "transient", False)


def clear() -> None:
    """Clear the cache, after a change of settings that no cache key holds."""
    _plans.clear()


def key_of(operator: str, arguments: Sequence[Any]) -> Key | None:
    """The cache key of a call: its metadata and the settings that validation, dispatch and planning depend on.

    None for a call with a tensor that has no strides, e.g. a sparse one.  Only the first tensor's device is checked for
    settings of CUDA.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return key_of_tensors(operator, tensors, [Tensor if isinstance(value, Tensor) else value for value in arguments])


def key_of_lists(operator: str, arguments: Sequence[Any]) -> Key | None:
    """`key_of` for calls with lists, of tensors or of numbers; None for a call without tensors."""
    tensors: list[Tensor] = []
    rest: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            tensors.append(value)
            rest.append(Tensor)
        elif not isinstance(value, (list, tuple)):
            rest.append(value)
        elif value and isinstance(value[0], Tensor):
            tensors.extend(value)
            rest.append(len(value))
        else:
            rest.append(tuple(value))
    return key_of_tensors(operator, tensors, rest) if tensors else None


def key_of_tensors(operator: str, tensors: Sequence[Tensor], rest: Sequence[Any]) -> Key | None:
    """The cache key of a call whose tensors are listed apart; `rest` has everything else, one entry per argument."""
    first = tensors[0]
    # On CUDA a setting decides whether float32 is multiplied as TF32 or IEEE float32.
    precision: str | None = None
    if first.is_cuda and first.dtype == torch.float32:
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        strides = [*map(Tensor.stride, tensors)]
        addresses = functools.reduce(or_, map(Tensor.data_ptr, tensors))
    except RuntimeError:  # sparse
        return None
    misaligned: tuple[bool, ...] = ()
    if addresses % _ALIGNED_BYTES:
        misaligned = tuple(each.data_ptr() % _ALIGNED_BYTES != 0 for each in tensors)
    return (
        *(operator, dispatch.forced_by(), precision, misaligned),
        *(*rest, *map(_PROPERTIES, tensors), *strides),
    )


def get(key: Key | None) -> Any:
    """The plan under a key, or None; always None while a call is explained."""
    return None if key is None or dispatch.is_explaining() else _plans.get(key)


def put(key: Key | None, plan: Any) -> None:
    if key is None:
        return
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = plan


class _Local(threading.local):
    """The open sequence of this thread."""

    sequence: Sequenced | None = None


_local = _Local()


class Sequenced:
    """A context in which the plans of several calls are cached together, under one key, each by its position.

    For a formula that makes the same calls in the same order whenever its own key is equal: eight separate keys took a
    tenth of the formula's host time.

    Args:
        key: a cache key of all that the order, the arguments and the dispatch of the calls depend on.
    """

    __slots__ = ("_key", "_known", "_made", "_outer")

    def __init__(self, key: Key | None) -> None:
        self._key = key
        self._known: tuple[Plan, ...] | None = get(key)
        self._made: list[Plan] = []
        self._outer: Sequenced | None = None

    def __enter__(self) -> None:
        self._outer, _local.sequence = _local.sequence, self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        _local.sequence = self._outer
        if kind is None and self._known is None and not any(each.transient for each in self._made):
            put(self._key, tuple(self._made))

    def next(self, operator: Operator[Any], call: Any) -> Plan:
        """The plan in the next position."""
        if self._known is None:
            plan = _get_or_make(operator, call)
        else:
            plan = self._known[len(self._made)]
            assert plan.operator == operator.name, f"{operator} in the place of {plan.operator}"
        self._made.append(plan)
        return plan


def get_or_make(operator: Operator[Any], call: Any) -> Plan:
    """The plan of a call: from the open sequence, from the cache, or new."""
    sequence = _local.sequence
    return _get_or_make(operator, call) if sequence is None else sequence.next(operator, call)


def _get_or_make(operator: Operator[Any], call: Any) -> Plan:
    key = operator.key_of(operator.name, call)
    plan: Plan | None = _plans.get(key)  # type: ignore[arg-type]
    if plan is not None and not dispatch.is_explaining():
        return plan
    call.check()
    if call.empty() is not None:
        return Plan(operator.name, None, lambda call: call.empty())
    chosen, explanation = dispatch.select(operator, call)
    if chosen is None:
        if dispatch.is_explaining():
            raise dispatch.Explained(explanation)
        assert operator.compose is not None
        plan = Plan(operator.name, None, operator.compose.plan(call))
    else:
        plan = Plan(operator.name, explanation.backend, chosen.plan(call))
        if dispatch.is_explaining():
            raise dispatch.Explained(dispatch.complete(explanation, operator, call, plan.run))
    if not plan.transient:
        put(key, plan)
    return plan
