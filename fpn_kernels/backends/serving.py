"""Calls that are alike are checked, given to a backend and prepared once.

These steps read nothing of a tensor but what `likeness` holds.  They took 8 us of a call, and 50 of one that a Triton
kernel serves (one core of an Intel Xeon, where eager PyTorch takes 15 for a small convolution, resize and addition): on
a GPU, time in which nothing is launched.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import selection

# As `backends.triton.geometry` asks of an address.
_ALIGNED_BYTES = 16
_PROPERTIES = attrgetter("shape", "dtype", "device")

# By likeness.  A program whose every call has new shapes starts anew from time to time.
_remembered: dict[tuple[Any, ...], Any] = {}
_MOST_REMEMBERED = 4096


class Prepared:
    """What serves a call and all that are like it: a backend's name (None: nothing to compute) and its function."""

    __slots__ = ("backend", "operator", "run")

    def __init__(self, operator: str, backend: str | None, run: Callable[..., Any]) -> None:
        self.operator, self.backend, self.run = operator, backend, run

    def __call__(self, *arguments: Any) -> Any:
        if selection.records and self.backend is not None:
            selection.record(self.operator, self.backend)
        return self.run(*arguments)

    @property
    def transient(self) -> bool:
        return getattr(self.run, "transient", False)


def forget() -> None:
    """Forgets what was prepared: for whoever changes what selection goes by, other than by `use_backend`."""
    _remembered.clear()


def likeness(operator: str, arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that checks, selection and preparation go by; None for a tensor that has it not, such as a sparse one.

    The first tensor tells for all on which kind of device they are.
    """
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    return likeness_of(operator, tensors, [Tensor if isinstance(each, Tensor) else each for each in arguments])


def likeness_of(operator: str, tensors: Sequence[Tensor], rest: Sequence[Any]) -> tuple[Any, ...] | None:
    """The likeness of a call whose tensors are listed; the rest tells which of them are what.

    Twelve tensors one by one, with their options among them, took 13 us, and so 8 (one core of Zen 3).
    """
    first = tensors[0]
    # On CUDA it is a setting how float32 is multiplied: as TF32 or IEEE.
    products: str | None = None
    if first.is_cuda and first.dtype == torch.float32:
        products = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        strides = [*map(Tensor.stride, tensors)]
        addresses = functools.reduce(or_, map(Tensor.data_ptr, tensors))
    except RuntimeError:  # sparse: it has none
        return None
    misaligned: tuple[bool, ...] = ()
    if addresses % _ALIGNED_BYTES:
        misaligned = tuple(each.data_ptr() % _ALIGNED_BYTES != 0 for each in tensors)
    return (
        *(operator, selection.forced_by(), products, misaligned),
        *(*rest, *map(_PROPERTIES, tensors), *strides),
    )


def recall(key: tuple[Any, ...] | None) -> Any:
    """What was remembered under a likeness, or None; while a call is being explained, None."""
    return None if key is None or selection.is_explaining() else _remembered.get(key)


def remember(key: tuple[Any, ...] | None, value: Any) -> None:
    if key is None:
        return
    if len(_remembered) >= _MOST_REMEMBERED:
        _remembered.clear()
    _remembered[key] = value


class _Open(threading.local):
    """The calls that are being remembered together in this thread."""

    calls: together | None = None


_open = _Open()


class together:  # noqa: N801 - used like torch.no_grad, hence named like it
    """Remembers the calls inside a block as one: under one likeness, each of them by its place.

    For a formula that makes the same calls in the same order whenever what its key holds is the same: of eight calls
    a likeness each was a tenth of the formula's time on the host.

    Args:
        key: a likeness, of all that the order, the arguments and the choice of the calls depend on.
    """

    __slots__ = ("_key", "_known", "_made", "_outer")

    def __init__(self, key: tuple[Any, ...] | None) -> None:
        self._key = key
        self._known: tuple[Prepared, ...] | None = recall(key)
        self._made: list[Prepared] = []
        self._outer: together | None = None

    def __enter__(self) -> None:
        self._outer, _open.calls = _open.calls, self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        _open.calls = self._outer
        if kind is None and self._known is None and not any(each.transient for each in self._made):
            remember(self._key, tuple(self._made))

    def next(self, operator: str) -> Prepared | None:
        """The call in this place, or None where it was not remembered."""
        if self._known is None:
            return None
        known = self._known[len(self._made)]
        assert known.operator == operator, f"{operator} in the place of {known.operator}"
        self._made.append(known)
        return known

    def add(self, prepared: Prepared) -> None:
        """Takes down a call that `next` did not know."""
        self._made.append(prepared)


def _as_given(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def prepare(
    operator: str,
    *arguments: Any,
    check: Callable[..., None],
    empty: Callable[..., Any],
    adapt: Callable[..., tuple[Any, ...]] = _as_given,
) -> Prepared:
    """What computes a call and all calls like it.

    Args:
        operator: its name.
        *arguments: the operator's, as they came: calls that differ in them share nothing.
        check, empty: as in `call`.
        adapt: makes what a backend is given of the arguments.
    """
    calls = _open.calls
    if calls is None:
        return _prepared(operator, arguments, check, empty, adapt)
    prepared = calls.next(operator)
    if prepared is None:
        prepared = _prepared(operator, arguments, check, empty, adapt)
        calls.add(prepared)
    return prepared


def _prepared(
    operator: str,
    arguments: tuple[Any, ...],
    check: Callable[..., None],
    empty: Callable[..., Any],
    adapt: Callable[..., tuple[Any, ...]],
) -> Prepared:
    key = likeness(operator, arguments)
    known: Prepared | None = recall(key)
    if known is not None:
        return known
    check(*arguments)
    if arguments[0].numel() == 0:
        return Prepared(operator, None, empty)
    adapted = adapt(*arguments)
    backend, explanation = selection.select(operator, adapted)
    return _given_to(backend, explanation, key, operator, adapted)


def prepare_whole(key: tuple[Any, ...] | None, operator: str, *arguments: Any, composition: str) -> Prepared | None:
    """What computes an operator that a backend may have as a whole, or None where it is made of others.

    Args:
        key: the call's likeness, under which it was not recalled.
        operator: its name.
        *arguments: the operator's, by position; they have been checked.
        composition: what it is made of.
    """
    backend, explanation = selection.select_whole(operator, arguments, composition)
    if backend is None and not selection.is_explaining():
        return None
    return _given_to(backend, explanation, key, operator, arguments)


def _given_to(
    backend: selection.Backend | None,
    explanation: selection.Explanation,
    key: tuple[Any, ...] | None,
    operator: str,
    arguments: tuple[Any, ...],
) -> Prepared:
    """Has the backend that was selected prepare a call, and remembers it; a call that is being explained ends here."""
    if backend is None or selection.is_explaining():
        raise selection.Explained(explanation)
    prepared = Prepared(operator, backend.name, backend.implementations[operator].prepare(*arguments))
    if not prepared.transient:
        remember(key, prepared)
    return prepared


def call(operator: str, *arguments: Any, check: Callable[..., None], empty: Callable[..., Any]) -> Any:
    """Checks a call, selects a backend for it and computes the operator; of a call like an earlier one, computes it.

    Args:
        operator: its name.
        *arguments: the operator's, all by position, the first of them a tensor.
        check: raises what is wrong with them.
        empty: makes the result where the first tensor has no elements, of the same arguments.
    """
    return prepare(operator, *arguments, check=check, empty=empty)(*arguments)
