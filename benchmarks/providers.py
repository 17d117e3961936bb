"""Who computes a case: eager PyTorch, torch.compile of the same, and the library.

The list follows `fpn_kernels.available_backends()`, so that a backend that is added to the library is measured
without a change here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

import fpn_kernels
from benchmarks.cases import COMPILE, EAGER, LIBRARY, MAX_AUTOTUNE
from fpn_kernels.operators import dispatch
from fpn_kernels.operators import plan_cache
from fpn_kernels.operators.dispatch import BackendUnavailableError


class NotMeasuredError(Exception):
    """This provider cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A column of the report.

    Attributes:
        name: its heading.
        fused: whether it calls the library, or the eager twin.
        backend: the backend that is forced; None leaves the choice to the library, as a user gets it.
        compile_mode: what torch.compile is asked for, where it is used at all.
        unforced: operators that the library may choose as if a backend that has them were not to be forced first.
    """

    name: str
    fused: bool = False
    backend: str | None = None
    compile_mode: str | None = None
    unforced: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def selected(self) -> AbstractContextManager[Any]:
        """Forces the backend, or frees the choice; `NotMeasuredError` where the backend is not here."""
        if self.unforced:
            return _unforced(self.unforced)
        try:
            return fpn_kernels.use_backend(self.backend) if self.backend else nullcontext()
        except BackendUnavailableError as error:
            raise NotMeasuredError(str(error)) from error

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` as this provider runs it."""
        if self.compile_mode is None:
            return call
        torch._dynamo.reset()  # each case compiles afresh: no recompilation limit, no graph of another shape
        return torch.compile(call, dynamic=False, mode=self.compile_mode)


@contextmanager
def _unforced(operators: Sequence[str]) -> Iterator[None]:
    """Takes away what keeps selection from these operators, where a backend has one that is `only_forced`."""
    before = dispatch.backends()
    for backend in before:
        freed = {
            name: replace(implementation, only_forced=None) if name in operators else implementation
            for name, implementation in backend.implementations.items()
        }
        dispatch.register(replace(backend, implementations=freed))
    plan_cache.clear()
    try:
        yield
    finally:
        for backend in before:
            dispatch.register(backend)
        plan_cache.clear()


def providers(device_type: str, preset: str, available: tuple[str, ...], compiled: bool) -> Iterator[Provider]:
    """The providers of one case, the baseline first.

    "fpn_kernels" is the library as it is used, free to choose; the report names the backends that served it. Where
    it has more than one real choice (or always, with --full), each backend is measured by itself as well: "eager"
    is one of them only then, because where nothing better is here it is what "fpn_kernels" already measures.
    """
    yield Provider(EAGER)
    if compiled:
        yield Provider(COMPILE, compile_mode="default")
        if preset == "full" and device_type == "cuda":
            yield Provider(MAX_AUTOTUNE, compile_mode="max-autotune")
    yield Provider(LIBRARY, fused=True)
    real = [name for name in available if name != "eager" and serves(name, device_type)]
    if len(real) > 1 or (real and preset == "full"):
        forced = [*real, "eager"] if preset == "full" else real
        yield from (Provider(f"{LIBRARY}/{name}", fused=True, backend=name) for name in forced)


def serves(backend: str, device_type: str) -> bool:
    """Whether to measure this backend on that device: Triton on CUDA only, never its interpreter."""
    return backend != "triton" or device_type == "cuda"


def compiler_missing(device_type: str) -> str | None:
    """Why torch.compile cannot work here, or None. Inductor writes C++ for the CPU and Triton for CUDA."""
    if device_type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"torch.compile needs Triton on CUDA: {error}"
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in candidates):
        return f"torch.compile needs a C++ compiler: none of {', '.join(candidates)} is here"
    return None


_compile_failure: list[str] = []


def require_compiler(device_type: str) -> None:
    """Raises `NotMeasuredError` where torch.compile cannot work, or has failed before."""
    reason = _compile_failure[0] if _compile_failure else compiler_missing(device_type)
    if reason:
        raise NotMeasuredError(reason)


def compilation_failed(error: Exception) -> NotMeasuredError:
    """What to raise instead: a toolchain that does not work (no Python headers, say) stops the rival, not the run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    _compile_failure.append(f"torch.compile failed here: {lines[0] if lines else type(error).__name__}"[:300])
    return NotMeasuredError(_compile_failure[0])


def forget_failed_compilation() -> None:
    """The next case tries again, for a run in which what fails is the case and not the toolchain."""
    _compile_failure.clear()
