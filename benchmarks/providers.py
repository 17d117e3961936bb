"""The providers of a row: eager PyTorch, torch.compile of the same, the library, and candidates for its kernels."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import fpn_kernels
from benchmarks.cases import COMPILE, EAGER, LIBRARY, MAX_AUTOTUNE, Case
from benchmarks.internals import BackendUnavailableError


class NotMeasuredError(Exception):
    """A row that cannot be measured here; the message is the reason."""


@dataclass(frozen=True)
class Provider:
    """A column of the report.

    Attributes:
        name: its heading.
        fused: whether it calls the library, or the eager twin.
        backend: the forced backend; None leaves the choice to the library, as for a user.
        compile_mode: the mode of torch.compile; None without it.
        candidate: a call in place of the library's, which is then the baseline.
    """

    name: str
    fused: bool = False
    backend: str | None = None
    compile_mode: str | None = None
    candidate: Callable[..., Any] | None = None

    def selected(self) -> AbstractContextManager[Any]:
        """Forces the backend; `NotMeasuredError` where this machine does not have it."""
        try:
            return fpn_kernels.use_backend(self.backend) if self.backend else nullcontext()
        except BackendUnavailableError as error:
            raise NotMeasuredError(str(error)) from error

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` as this provider runs it."""
        if self.compile_mode is None:
            return call
        torch._dynamo.reset()  # no recompilation limit, no graph of another shape
        return torch.compile(call, dynamic=False, mode=self.compile_mode)


def named(name: str) -> Provider:
    """A provider by its name in the report.

    max-autotune runs without CUDA graphs of its own, which copy every input first; the harness's graph then times the
    kernels alone. It is the faster form of that rival.
    """
    if name == EAGER:
        return Provider(name)
    if name == COMPILE:
        return Provider(name, compile_mode="default")
    if name == MAX_AUTOTUNE:
        return Provider(name, compile_mode="max-autotune-no-cudagraphs")
    library, _, backend = name.partition("/")
    if library != LIBRARY:
        known = f"{EAGER!r}, {COMPILE!r}, {MAX_AUTOTUNE!r} or {LIBRARY!r}[/backend]"
        raise ValueError(f"name: expected {known}, got {name!r}")
    return Provider(name, fused=True, backend=backend or None)


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


@dataclass(frozen=True)
class Candidate:
    """A call that may replace the library's.

    Attributes:
        name: unique in its list.
        cases: the cases to time it on.
        call: takes the inputs of the case's workload, as the library's call does (`workloads.py`); raises
            `NotMeasuredError` with the reason for a call that it cannot serve.
    """

    name: str
    cases: Sequence[Case]
    call: Callable[..., Any]

    def __str__(self) -> str:
        return self.name


def candidates(module: str) -> list[Candidate]:
    """The candidates of a module."""
    found: list[Candidate] = importlib.import_module(module).CANDIDATES
    return found
