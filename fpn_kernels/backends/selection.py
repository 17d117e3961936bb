"""Which backend serves a call: the order of preference, the reasons against each, and what was forced.

A backend states each reason once, in a predicate (`Implementation.refusal`) that returns it or None; selection,
`explain` and the error of a forced backend all read the same predicate.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

ENVIRONMENT_VARIABLE = "FPN_KERNELS_BACKEND"

Result = TypeVar("Result")


class BackendUnavailableError(ValueError):
    """A backend was named that is unknown, not on this machine, or cannot serve the call."""


def _no_preference(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    return torch.preserve_format


def _no_evidence(*arguments: object) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One operator on one backend.

    Attributes:
        prepare: takes the operator's arguments, all by position; returns what computes the operator for these, and for
            any others that are alike: their tensors have the same shapes, strides, dtypes, devices and alignment, and
            all else is equal.  The function that it returns holds on to none of the tensors, and is remembered
            (`serving`) unless it has a true attribute `transient`.
        refusal: takes the same arguments; returns why this call cannot be served, or None.
        fastest_format: takes a type of device and a dtype; returns the layout of the map in which the operator is
            fastest there, whatever layout its result has, `torch.preserve_format` where that does not matter (or is
            not known), or None for a device that the backend does not serve.
        only_forced: takes the same arguments; returns why selection passes this call over unless the backend is forced
            (such as that another is faster, or that nobody has measured it), or None.  Itself None where no call is.
        optional: whether eager serves the calls that the backend refuses where it is forced; otherwise they raise.
        evidence: takes the same arguments; returns in one line which measurement, or which argument, is the reason
            that this backend serves the call.
    """

    prepare: Callable[..., Callable[..., Any]]
    refusal: Callable[..., str | None]
    fastest_format: Callable[[str, torch.dtype], torch.memory_format | None] = _no_preference
    only_forced: Callable[..., str | None] | None = None
    optional: bool = False
    evidence: Callable[..., str] = _no_evidence


def unprepared(run: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """`Implementation.prepare` where there is nothing to prepare."""
    return lambda *arguments: run


class AtOnce(Generic[Result]):
    """Decorates an `Implementation.prepare`: called, it computes; `prepare` is the function itself."""

    def __init__(self, prepare: Callable[..., Callable[..., Result]]) -> None:
        functools.update_wrapper(self, prepare)
        self.prepare = prepare

    def __call__(self, *arguments: Any) -> Result:
        return self.prepare(*arguments)(*arguments)


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute the operators.

    Attributes:
        name: what `use_backend` calls it.
        unavailable: why nothing of it works on this machine, or None.
        implementations: operator name to implementation.
    """

    name: str
    unavailable: Callable[[], str | None]
    implementations: Mapping[str, Implementation]

    def refusal(self, operator: str, arguments: tuple[Any, ...], forced: bool = False) -> str | None:
        """Why this backend cannot serve this call or, where it is not forced, does not; or None."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        implementation = self.implementations.get(operator)
        if implementation is None:
            return f"has no implementation of {operator}"
        reason = implementation.refusal(*arguments)
        if reason is not None or forced or implementation.only_forced is None:
            return reason
        reason = implementation.only_forced(*arguments)
        return None if reason is None else f"opt-in: {reason}"

    def evidence(self, operator: str, arguments: tuple[Any, ...]) -> str:
        """The measurement, or the argument, behind a call that this backend serves, in one line."""
        implementation = self.implementations[operator]
        reason = implementation.only_forced and implementation.only_forced(*arguments)
        return f"none, it is opt-in: {reason}" if reason else implementation.evidence(*arguments)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each one tried before it does not.

    Attributes:
        operator: the operator asked about.
        backend: the name of the backend that serves it.
        refusals: backend name to reason, in the order in which they were asked.
        forced: whether `use_backend` or the environment variable named the backend.
        evidence: which measurement, or which argument, is the reason that it serves, in one line.
    """

    operator: str
    backend: str
    refusals: Mapping[str, str]
    forced: bool = False
    evidence: str = ""

    def __str__(self) -> str:
        how = " (forced)" if self.forced else ""
        lines = [f"{self.operator}: served by {self.backend}{how}"]
        lines += [f"  {name} does not: {reason}" for name, reason in self.refusals.items()]
        lines += [f"  evidence: {self.evidence}"] if self.evidence else []
        return "\n".join(lines)


class Explained(Exception):  # noqa: N818 - carries an answer out of the dispatcher; nothing went wrong
    """Ends a dry run at the point where the kernel would have been launched."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


_registry: dict[str, Backend] = {}

# The autograd engine runs the backward of CUDA tensors in threads of its own, where a context variable of the
# caller is not seen: the forced backend is therefore the process's, like PyTorch's own backend flags.  It is that of
# the last request that has not ended.
_forced: str | None = None
_requests: tuple[use_backend, ...] = ()
_requests_lock = threading.Lock()

# Of this thread alone, for a computation without gradients; goes before the others.
_forced_here: contextvars.ContextVar[str | None] = contextvars.ContextVar("fpn_kernels_forced_here", default=None)

records: list[list[tuple[str, str]]] = []
_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("fpn_kernels_explaining", default=False)


def register(backend: Backend) -> None:
    """Adds a backend; the order of registration is the order of preference."""
    _registry[backend.name] = backend


def backends() -> tuple[Backend, ...]:
    """All backends known, in order of preference, here or not."""
    return tuple(_registry.values())


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, in order of preference.

    Returns:
        Of "native", "triton" and "eager", those that are here; "eager" always is, and is the last.

    Cost:
        Moves no bytes.  The first call loads the compiled library and asks whether Triton and a GPU are there.
    """
    return tuple(backend.name for backend in backends() if backend.unavailable() is None)


def _named(name: str, argument: str) -> Backend:
    if name not in _registry:
        raise BackendUnavailableError(f"{argument}: expected one of {tuple(_registry)}, got {name!r}")
    backend = _registry[name]
    reason = backend.unavailable()
    if reason is not None:
        raise BackendUnavailableError(f"{argument}: backend {name!r} is not available here: {reason}")
    return backend


class use_backend:  # noqa: N801 - used like torch.set_grad_enabled, hence named like it
    """Forces one backend for every call that follows, or, as a context manager, inside a block.

    The choice holds for the whole process, its autograd threads included (as `torch.backends` flags do), and goes
    before the environment variable FPN_KERNELS_BACKEND.  Of blocks that overlap in several threads, the last that began
    and has not ended decides.

    Args:
        name: "native", "triton" or "eager"; None gives the choice back to the library.  An operator that the backend
            does not have at all (`explain` tells) is left to eager.

    Raises:
        TypeError: `name` is not a string or None.
        ValueError: the backend is unknown or not on this machine (the message says why).  A call that a forced
            backend cannot serve raises the same, with the reason.

    Cost:
        Moves no bytes; sets one variable.

    Source:
        Used like `torch.set_grad_enabled`, and of the whole process like the flags of `torch.backends`.

    Example:
        ```python
        with fpn_kernels.use_backend("eager"):
            merged = fpn_kernels.upsample_add(top, lateral)
        ```
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            if not isinstance(name, str):
                raise TypeError(f"name: expected a backend's name or None, got {type(name).__name__}")
            _named(name, "name")
        self._name = name
        self._entered = False
        self._thread = threading.get_ident()
        _change_requests(add=self)

    def __enter__(self) -> use_backend:
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        # Its own request only: another thread's may have been added since, or ended.
        _change_requests(remove=self)


def _change_requests(add: use_backend | None = None, remove: use_backend | None = None) -> None:
    global _forced, _requests
    with _requests_lock:
        kept = [each for each in _requests if each is not remove]
        if add is not None:
            # Of a thread's choices without a block, the last: others can have no effect any more.
            plain = [each for each in kept if each._thread == add._thread and not each._entered]
            kept = [each for each in kept if each not in plain[:-1]]
            kept.append(add)
        _requests = tuple(kept)
        _forced = _requests[-1]._name if _requests else None


@contextlib.contextmanager
def force_in_this_thread(name: str) -> Iterator[None]:
    """Forces a backend inside a block, in this thread alone; where autograd runs backward is another thread."""
    token = _forced_here.set(name)
    try:
        yield
    finally:
        _forced_here.reset(token)


def _forced_backend() -> Backend | None:
    forced = _forced_here.get() or _forced
    if forced is not None:
        return _registry[forced]
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _named(name, ENVIRONMENT_VARIABLE) if name else None


def _candidates(operator: str) -> tuple[tuple[Backend, ...], bool]:
    """The backends to ask, in order of preference, and whether one was forced.

    A forced backend without the operator, or for which it is optional, is no reason to fail a network that also uses
    those it has: eager serves what it does not.
    """
    forced = _forced_backend()
    if forced is None:
        return backends(), False
    implementation = forced.implementations.get(operator)
    complete = implementation is not None and not implementation.optional
    return (forced,) if complete else (forced, _registry["eager"]), True


def fastest_format(operator: str, device_type: str, dtype: torch.dtype) -> torch.memory_format:
    """The layout of a map in which an operator is fastest, by the backend that would serve it.

    What produces the map can then write it in that layout.  `torch.preserve_format` where it does not matter.
    """
    for backend in _candidates(operator)[0]:
        implementation = backend.implementations.get(operator)
        if implementation is None or backend.unavailable() is not None:
            continue
        answer = implementation.fastest_format(device_type, dtype)
        if answer is not None:
            return answer
    return torch.preserve_format


def _ask(operator: str, arguments: tuple[Any, ...]) -> tuple[Backend | None, dict[str, str], bool]:
    """The first backend that does not refuse the call, the reasons of those before it, and whether one was forced."""
    candidates, forced = _candidates(operator)
    refusals: dict[str, str] = {}
    for backend in candidates:
        reason = backend.refusal(operator, arguments, forced)
        if reason is None:
            return backend, refusals, forced
        refusals[backend.name] = reason
    return None, refusals, forced


def select(operator: str, arguments: tuple[Any, ...]) -> tuple[Backend, Explanation]:
    """The first backend, in order of preference, that does not refuse the call.

    Raises:
        BackendUnavailableError: a forced backend refuses it.
    """
    backend, refusals, forced = _ask(operator, arguments)
    if backend is not None:
        return backend, Explanation(operator, backend.name, refusals, forced, backend.evidence(operator, arguments))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise BackendUnavailableError(f"{operator}: no backend serves this call ({reasons})")


def select_whole(operator: str, arguments: tuple[Any, ...], composition: str) -> tuple[Backend | None, Explanation]:
    """As `select`, of an operator that is made of others where no backend serves it as a whole.

    A forced backend that refuses it as a whole is asked again for each of those others.
    """
    backend, refusals, forced = _ask(operator, arguments)
    if backend is None:
        evidence = "each of these calls is selected by itself"
        return None, Explanation(operator, f"composition: {composition}", refusals, forced, evidence)
    return backend, Explanation(operator, backend.name, refusals, forced, backend.evidence(operator, arguments))


def forced_by() -> tuple[str | None, str | None]:
    """The backend that `use_backend` forces (or, of this thread, a trial), and the one of the environment variable."""
    return _forced_here.get() or _forced, os.environ.get(ENVIRONMENT_VARIABLE)


def is_explaining() -> bool:
    return _explaining.get()


def record(operator: str, backend: str) -> None:
    """Writes a call served into each list that `record_calls` has given out."""
    for calls in records:
        calls.append((operator, backend))


@contextlib.contextmanager
def record_calls() -> Iterator[list[tuple[str, str]]]:
    """Yields a list that fills with ``(operator, backend)``, one pair a call served, from all threads."""
    calls: list[tuple[str, str]] = []
    records.append(calls)
    try:
        yield calls
    finally:
        records[:] = [other for other in records if other is not calls]


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Makes the next call raise `Explained` where its kernel would be launched."""
    token = _explaining.set(True)
    try:
        yield
    finally:
        _explaining.reset(token)
