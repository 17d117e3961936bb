"""The backends on the devices that the operator tests run on, and the proof of which one served."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from samples import Sizes

from fpn_kernels.backends import native, selection


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend and the device its tensors are on."""

    backend: str
    device: str
    label: str
    # The operators that it has, where it has not all of them.
    operators: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.label

    def unavailable(self) -> str | None:
        """Why this machine does not have the backend, or None."""
        reason = {backend.name: backend for backend in selection.backends()}[self.backend].unavailable()
        if reason is None and (self.backend, self.device) == ("native", "cuda"):
            return native.cuda_refusal(torch.cuda.current_device())
        return reason

    def has(self, operator: str | None) -> bool:
        """Whether it computes an operator, or, asked for None, all of them."""
        return not self.operators or operator in self.operators

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the backend computes."""
        floats = (torch.float32, torch.bfloat16, torch.float16)
        return floats if self.backend == "triton" else (*floats, torch.float64)

    def affordable(self, sizes: Sequence[Sizes]) -> list[Sizes]:
        """All of them; under the interpreter, which takes a millisecond an instruction, the small ones."""
        if self.label != "triton-interpreter":
            return list(sizes)
        return [s for s in sizes if s.batch * s.channels * s.fine[0] * s.fine[1] <= 4000]

    def require(self, dtype: torch.dtype) -> None:
        """Skips a dtype that the backend leaves to eager (`test_backends.py` shows that it says so)."""
        if dtype not in self.dtypes():
            pytest.skip(f"{self.backend} leaves {dtype} to eager")

    def implements(self, operator: str) -> bool:
        """Whether the backend has this operator, and not only for some calls where it is forced."""
        backend = {backend.name: backend for backend in selection.backends()}[self.backend]
        implementation = backend.implementations.get(operator)
        return implementation is not None and not implementation.optional

    def has_whole(self, operator: str) -> bool:
        """Whether the backend, forced, computes as a whole what others make of several operators."""
        backends = {backend.name: backend.implementations for backend in selection.backends()}
        return operator in backends[self.backend] and operator not in backends["eager"]

    def pathway(self) -> str:
        """What a forward `top_down_pathway` is served as, where this backend is forced."""
        return "top_down_pathway" if self.has_whole("top_down_pathway") else "lateral_connection"

    def require_operator(self, operator: str) -> None:
        """Skips an operator that the backend does not have; eager, which serves it then, is a target of its own."""
        if not self.implements(operator):
            pytest.skip(f"{self.backend} has no implementation of {operator}")

    def opcheck(
        self, operator: Any, arguments: tuple[Any, ...], options: dict[str, Any] | None = None, **bounds: float
    ) -> None:
        """`torch.library.opcheck` of an operator that this backend computes.

        Under the interpreter without a compilation: a compiler is told the same of an operator whoever serves it.
        """
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if self.label != "triton-interpreter":
            checks.append("test_aot_dispatch_dynamic")
        with selection.use_backend(self.backend):
            torch.library.opcheck(operator, arguments, options, test_utils=checks, **bounds)

    @contextlib.contextmanager
    def serves(self, *operators: str) -> Iterator[None]:
        """Forces the backend, and asserts that it served each of these operators and nothing else did.

        An operator that the backend does not have is eager's.  A copy into another layout may stand beside them, and
        the sums for a bias.
        """
        with selection.use_backend(self.backend), selection.record_calls() as calls:
            yield
        expected = {
            (name, self.backend if self.implements(name) or self.has_whole(name) else "eager") for name in operators
        }
        beside = {"reorder", "channel_sums"} - set(operators)
        assert {call for call in calls if call[0] not in beside} == expected


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_ALL = [
    Target("eager", "cpu", "eager-cpu"),
    Target("native", "cpu", "native-cpu"),
    Target("native", "cuda", "native-cuda", ("upsample_add", "upsample_add_backward")),
    Target("eager", "cuda", "eager-cuda"),
    Target("triton", "cuda", "triton-cuda"),
]


def _here(target: Target) -> bool:
    return (target.device == "cpu" or torch.cuda.is_available()) and target.unavailable() is None


def parameters(operator: str | None = None, device: str | None = None) -> list[object]:
    """The targets that this machine has: those of one operator or of all, on one device or on any.

    Without a GPU there is one more, which shows as skipped what a GPU would add.

    Under TRITON_INTERPRET=1, the interpreter alone: the other targets have their run without it.
    """
    if INTERPRETED:
        return [pytest.param(Target("triton", "cpu", "triton-interpreter"), marks=pytest.mark.interpreter)]
    chosen = [target for target in _ALL if target.has(operator) and device in (None, target.device) and _here(target)]
    if not torch.cuda.is_available():
        chosen.append(_ALL[-1])
    gpu = pytest.mark.gpu
    return [pytest.param(target, marks=gpu if target.device == "cuda" else ()) for target in chosen]


def description() -> str:
    """One line for the head of the test run."""
    absent = [f"{b.name} ({b.unavailable()})" for b in selection.backends() if b.unavailable() is not None]
    return f"backends: {', '.join(selection.available_backends())}; not here: {'; '.join(absent) or 'none'}"
