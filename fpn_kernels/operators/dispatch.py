"""Which backend serves a call: the order of preference, the reasons against each, forcing, and `Explanation`.

A backend states each reason once, in a function of the call (`Implementation.refusal`, `Implementation.opt_in`).
Selection, `explain` and the error of a forced backend all use these.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fpn_kernels import native
from fpn_kernels.gpu import availability
from fpn_kernels.operators import evidence

if TYPE_CHECKING:
    from fpn_kernels.operators.operator import Operator

ENVIRONMENT_VARIABLE = "FPN_KERNELS_BACKEND"

Function = TypeVar("Function", bound=Callable[..., Any])

# Why a backend does not work on this machine (None: it does), in the order of preference: compiled code costs the host
# least per launch, and PyTorch serves every call.
BACKENDS: dict[str, Callable[[], str | None]] = {
    "native": native.load_error,
    "triton": availability.unavailable,
    "eager": lambda: None,
}


class BackendUnavailableError(ValueError):
    """A backend was named that is unknown, is not on this machine, or cannot serve the call."""


def _no_refusal(call: Any) -> None:
    return None


def _no_preference(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    return torch.preserve_format


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One operator on one backend.  Every function takes the operator's call record, unless stated otherwise.

    Attributes:
        plan: returns a function of the call that computes it, for this call and every other with the same cache key.
            That function keeps none of the tensors; it is cached unless it has a true attribute `transient`.  It may
            have an attribute `kernel`: which kernel, product or tile it runs, in a few words (`named`).
        refusal: returns why the call cannot be served, or None.
        opt_in: returns why the call is served only if the backend is forced (another is faster, or nothing was
            measured), or None.
        fastest_format: takes a device type and a dtype; returns the layout of the input map in which the operator is
            fastest, `torch.preserve_format` where that does not matter or is unknown, or None for a device that the
            backend does not serve.
        optional: whether eager serves the calls that the forced backend refuses; otherwise they raise.
        note: the evidence of an implementation that is not ours, in one line.
    """

    plan: Callable[[Any], Callable[[Any], Any]]
    refusal: Callable[[Any], str | None] = _no_refusal
    opt_in: Callable[[Any], str | None] = _no_refusal
    fastest_format: Callable[[str, torch.dtype], torch.memory_format | None] = _no_preference
    optional: bool = False
    note: str = ""


def named(run: Function, kernel: str) -> Function:
    """A plan's function with the name of the kernel that it runs, for `explain`."""
    run.kernel = kernel  # type: ignore[attr-defined]
    return run


@dataclasses.dataclass(frozen=True)
class Composition:
    """How an operator is composed of others where no backend has it as a whole.

    Attributes:
        of: what it is composed of, in a few words.
        plan: as `Implementation.plan`.
    """

    of: str
    plan: Callable[[Any], Callable[[Any], Any]]


def eager(run: Callable[[Any], Any], note: str = "") -> Implementation:
    """The implementation by plain PyTorch, which has nothing to plan."""
    return Implementation(lambda call: run, note=f"PyTorch's own operators{note}")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each one before it does not.

    Attributes:
        operator: the operator's name.
        backend: the name of the backend that serves the call.
        refusals: backend name to reason, in the order of preference.
        forced: whether `use_backend` or the environment variable named the backend.
        evidence: in one line, the measurement or the argument for which the backend serves the call.
        kernel: which kernel, product or tile computes the call; "" where the backend has only one.
        layout: the layout of the input map in which the backend is fastest; "" where it does not matter.
        gradient: which autograd records the call; "" where no gradient is required.
    """

    operator: str
    backend: str
    refusals: Mapping[str, str]
    forced: bool = False
    evidence: str = ""
    kernel: str = ""
    layout: str = ""
    gradient: str = ""

    def __str__(self) -> str:
        how = " (forced)" if self.forced else ""
        lines = [f"{self.operator}: served by {self.backend}{how}"]
        lines += [f"  kernel: {self.kernel}"] if self.kernel else []
        lines += [f"  fastest layout of the input: {self.layout}"] if self.layout else []
        lines += [f"  gradient: {self.gradient}"] if self.gradient else []
        lines += [f"  {name} does not: {reason}" for name, reason in self.refusals.items()]
        lines += [f"  evidence: {self.evidence}"] if self.evidence else []
        return "\n".join(lines)


class Explained(Exception):  # noqa: N818 - carries an answer out of the dispatcher; nothing went wrong
    """Ends a dry run at the point where the kernel would have been launched."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


# The autograd engine runs the backward of CUDA tensors in threads of its own, which do not see a context variable of
# the caller: the forced backend therefore holds for the process, like PyTorch's own backend flags.  The last request
# that has not ended decides.
_forced: str | None = None
_requests: tuple[use_backend, ...] = ()
_requests_lock = threading.Lock()

# For a computation without gradients in this thread alone; it precedes the others.
_forced_here: contextvars.ContextVar[str | None] = contextvars.ContextVar("fpn_kernels_forced_here", default=None)

records: list[list[tuple[str, str]]] = []
# While a call is explained: whether a gradient would be recorded.
_explaining: contextvars.ContextVar[bool | None] = contextvars.ContextVar("fpn_kernels_explaining", default=None)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, in order of preference.

    Returns:
        Those of "native", "triton" and "eager" that work here; "eager" always does, and is the last.

    Cost:
        Moves no bytes.  The first call loads the compiled library and looks for Triton and a GPU.
    """
    return tuple(name for name, unavailable in BACKENDS.items() if unavailable() is None)


def _require(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise BackendUnavailableError(f"{argument}: expected one of {tuple(BACKENDS)}, got {name!r}")
    reason = BACKENDS[name]()
    if reason is not None:
        raise BackendUnavailableError(f"{argument}: backend {name!r} is not available here: {reason}")
    return name


class use_backend:  # noqa: N801 - used like torch.set_grad_enabled, hence named like it
    """Forces one backend for every call that follows, or, as a context manager, inside a block.

    The choice holds for the whole process, its autograd threads included (as `torch.backends` flags do), and precedes
    the environment variable FPN_KERNELS_BACKEND.  Where blocks overlap in several threads, the block that began last
    decides.

    Args:
        name: "native", "triton" or "eager"; None lets the library choose again.  Eager serves an operator that the
            backend does not have at all (see `explain`).

    Raises:
        TypeError: `name` is not a string or None.
        ValueError: the backend is unknown or not on this machine (the message says why).  A call that a forced
            backend cannot serve raises the same, with the reason.

    Cost:
        Moves no bytes; sets one variable.

    Source:
        Modelled on `torch.set_grad_enabled`, with the scope of the flags of `torch.backends`.

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
            _require(name, "name")
        self._name = name
        self._entered = False
        self._thread = threading.get_ident()
        _change_requests(add=self)

    def __enter__(self) -> use_backend:
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        # Only its own request: another thread may have added or removed one since.
        _change_requests(remove=self)


def _change_requests(add: use_backend | None = None, remove: use_backend | None = None) -> None:
    global _forced, _requests
    with _requests_lock:
        kept = [each for each in _requests if each is not remove]
        if add is not None:
            # Keep the last choice that a thread made without a block: earlier ones have no effect any more.
            plain = [each for each in kept if each._thread == add._thread and not each._entered]
            kept = [each for each in kept if each not in plain[:-1]]
            kept.append(add)
        _requests = tuple(kept)
        _forced = _requests[-1]._name if _requests else None


@contextlib.contextmanager
def force_in_this_thread(name: str) -> Iterator[None]:
    """Force a backend inside a block, in this thread alone; autograd may run a backward in another thread."""
    token = _forced_here.set(name)
    try:
        yield
    finally:
        _forced_here.reset(token)


def _forced_backend() -> str | None:
    forced = _forced_here.get() or _forced
    if forced is not None:
        return forced
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _require(name, ENVIRONMENT_VARIABLE) if name else None


def _candidates(operator: Operator[Any]) -> tuple[tuple[str, ...], bool]:
    """The backends to try, in order of preference, and whether one was forced.

    A forced backend without the operator, or for which it is optional, does not fail a network that uses other
    operators of that backend: eager serves the rest.
    """
    forced = _forced_backend()
    if forced is None:
        return tuple(BACKENDS), False
    implementation = operator.backends.get(forced)
    complete = implementation is not None and not implementation.optional
    return (forced,) if complete else (forced, "eager"), True


def fastest_format(operator: Operator[Any], device_type: str, dtype: torch.dtype) -> torch.memory_format:
    """The layout of an input map in which an operator is fastest, on the backend that would serve it.

    The producer of the map can then write that layout.  `torch.preserve_format` where it does not matter.
    """
    for name in _candidates(operator)[0]:
        implementation = operator.backends.get(name)
        if implementation is None or BACKENDS[name]() is not None:
            continue
        answer = implementation.fastest_format(device_type, dtype)
        if answer is not None:
            return answer
    return torch.preserve_format


def refusal(operator: Operator[Any], backend: str, call: Any, forced: bool = False) -> str | None:
    """Why a backend cannot serve a call or, where it is not forced, does not; or None."""
    reason = BACKENDS[backend]()
    if reason is not None:
        return reason
    implementation = operator.backends.get(backend)
    if implementation is None:
        return f"has no implementation of {operator.name}"
    reason = implementation.refusal(call)
    if reason is not None or forced:
        return reason
    reason = implementation.opt_in(call)
    return None if reason is None else f"opt-in: {reason}"


def select(operator: Operator[Any], call: Any) -> tuple[Implementation | None, Explanation]:
    """The first implementation, in order of preference, that serves the call; None for the operator's composition.

    Raises:
        BackendUnavailableError: a forced backend refuses the call, and nothing may take its place.
    """
    candidates, forced = _candidates(operator)
    refusals: dict[str, str] = {}
    for name in candidates:
        reason = refusal(operator, name, call, forced)
        if reason is None:
            chosen = operator.backends[name]
            reason = chosen.opt_in(call)
            text = f"none, it is opt-in: {reason}" if reason else chosen.note or evidence.of(name, operator.name, call)
            return chosen, Explanation(operator.name, name, refusals, forced, text)
        refusals[name] = reason
    if operator.compose is not None:
        text = "each of these calls is selected by itself"
        return None, Explanation(operator.name, f"composition: {operator.compose.of}", refusals, forced, text)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise BackendUnavailableError(f"{operator.name}: no backend serves this call ({reasons})")


def forced_by() -> tuple[str | None, str | None]:
    """The backend that `use_backend` (or a trial in this thread) forces, and that of the environment variable."""
    return _forced_here.get() or _forced, os.environ.get(ENVIRONMENT_VARIABLE)


def is_explaining() -> bool:
    return _explaining.get() is not None


def complete(explanation: Explanation, operator: Operator[Any], call: Any, run: Callable[[Any], Any]) -> Explanation:
    """The explanation of a call with the choices that its plan made, and who records its gradient."""
    kernel, layout, gradient = getattr(run, "kernel", ""), "", ""
    chosen = operator.backends.get(explanation.backend)
    tensors = [each for value in call for each in (value if isinstance(value, (list, tuple)) else (value,))]
    tensors = [each for each in tensors if isinstance(each, torch.Tensor)]
    if chosen is not None:
        fastest = chosen.fastest_format(tensors[0].device.type, tensors[0].dtype)
        layout = {torch.channels_last: "NHWC", torch.contiguous_format: "NCHW"}.get(fastest, "")  # type: ignore[arg-type]
    if _explaining.get() and any(each.requires_grad for each in tensors):
        gradient = operator.recorded_by(call, explanation.backend)
    return dataclasses.replace(explanation, kernel=kernel, layout=layout, gradient=gradient)


def record(operator: str, backend: str) -> None:
    """Append a call to each list that `record_calls` has open."""
    for calls in records:
        calls.append((operator, backend))


@contextlib.contextmanager
def record_calls() -> Iterator[list[tuple[str, str]]]:
    """Yield a list that fills with ``(operator, backend)``, one pair per call served, from all threads."""
    calls: list[tuple[str, str]] = []
    records.append(calls)
    try:
        yield calls
    finally:
        records[:] = [other for other in records if other is not calls]


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Make the next call raise `Explained` where its kernel would be launched."""
    token = _explaining.set(torch.is_grad_enabled())
    try:
        yield
    finally:
        _explaining.reset(token)
