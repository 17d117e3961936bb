"""The backends and devices that the operator tests run on: the one helper that knows the internals of backends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from samples import Sizes

from fpn_kernels import native
from fpn_kernels.gpu import availability
from fpn_kernels.operators import dispatch, plan_cache
from fpn_kernels.operators.operator import OPERATORS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

record_calls = dispatch.record_calls
clear_plans = plan_cache.clear
no_library = native.load_error()
needs_library = pytest.mark.skipif(no_library is not None, reason=f"no compiled library: {no_library}")


def triton_unavailable() -> str | None:
    return availability.unavailable()


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend and the device of its tensors."""

    backend: str
    device: str
    label: str
    # Its operators, where it has not all of them.
    operators: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.label

    def unavailable(self) -> str | None:
        """Why this machine does not have the backend, or None."""
        reason: str | None = dispatch.BACKENDS[self.backend]()
        if reason is None and (self.backend, self.device) == ("native", "cuda"):
            return native.cuda_refusal(torch.cuda.current_device())
        return reason

    def has(self, operator: str | None) -> bool:
        """Whether the target has an operator, or (None) all of them."""
        return not self.operators or operator in self.operators

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the backend computes."""
        return DTYPES[:3] if self.backend == "triton" else DTYPES

    def affordable(self, sizes: Sequence[Sizes]) -> list[Sizes]:
        """All of them; the smallest ones under the interpreter, which takes a millisecond per instruction."""
        if self.label != "triton-interpreter":
            return list(sizes)
        return [s for s in sizes if s.batch * s.channels * s.fine[0] * s.fine[1] <= 700]

    def require(self, dtype: torch.dtype) -> None:
        """Skip a dtype that the backend leaves to eager."""
        if dtype not in self.dtypes():
            pytest.skip(f"{self.backend} leaves {dtype} to eager")

    def implements(self, operator: str) -> bool:
        """Whether the backend has this operator, and not only for some calls where it is forced."""
        implementation = OPERATORS[operator].backends.get(self.backend)
        return implementation is not None and not implementation.optional

    def has_whole(self, operator: str) -> bool:
        """Whether the backend, if forced, computes this operator as a whole and eager as several operators."""
        found = OPERATORS[operator].backends
        return self.backend in found and "eager" not in found

    def pathway(self) -> str:
        """The operator that computes a forward `top_down_pathway` where this backend is forced."""
        return "top_down_pathway" if self.has_whole("top_down_pathway") else "lateral_connection"

    def require_operator(self, operator: str) -> None:
        """Skip an operator that the backend does not have: eager serves it then, and eager is a target of its own."""
        if not self.implements(operator):
            pytest.skip(f"{self.backend} has no implementation of {operator}")

    def opcheck(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any] | None = None,
        *,
        compiled: bool = True,
        **bounds: float,
    ) -> None:
        """`torch.library.opcheck` of an operator, computed by this backend.

        Under the interpreter without a compilation: the compiler sees the same operator with every backend.
        """
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if compiled and self.label != "triton-interpreter":
            checks.append("test_aot_dispatch_dynamic")
        with dispatch.use_backend(self.backend):
            torch.library.opcheck(operator, arguments, options, test_utils=checks, **bounds)

    @contextlib.contextmanager
    def serves(self, *operators: str) -> Iterator[None]:
        """Force the backend, and assert that it computed each of these operators and no other backend did.

        Eager computes an operator that the backend does not have.  Copies into another layout and a bias's sums may
        come on top.
        """
        with dispatch.use_backend(self.backend), dispatch.record_calls() as calls:
            yield
        expected = {
            (name, self.backend if self.implements(name) or self.has_whole(name) else "eager") for name in operators
        }
        extra = {"reorder", "channel_sums"} - set(operators)
        assert {call for call in calls if call[0] not in extra} == expected


_ALL = [
    Target("eager", "cpu", "eager-cpu"),
    Target("native", "cpu", "native-cpu"),
    Target("native", "cuda", "native-cuda", ("upsample_add", "upsample_add_backward")),
    Target("eager", "cuda", "eager-cuda"),
    Target("triton", "cuda", "triton-cuda"),
]


def _here(target: Target) -> bool:
    return (target.device == "cpu" or torch.cuda.is_available()) and target.unavailable() is None


def parameters(operator: str | None = None, device: str | None = None) -> list[Any]:
    """The targets that this machine has: those of one operator or of all, on one device or on any.

    Without a GPU one more target shows, as skipped, the tests that a GPU would add.  Under TRITON_INTERPRET=1 the
    interpreter is the only target: the others run without it.
    """
    if INTERPRETED:
        return [pytest.param(Target("triton", "cpu", "triton-interpreter"), marks=pytest.mark.interpreter)]
    chosen = [target for target in _ALL if target.has(operator) and device in (None, target.device) and _here(target)]
    if not torch.cuda.is_available():
        chosen.append(_ALL[-1])
    gpu = pytest.mark.gpu
    return [pytest.param(target, marks=gpu if target.device == "cuda" else ()) for target in chosen]


def first_of_each(table: Mapping[Any, Sequence[Any]]) -> list[Any]:
    """Triton's tiles by the key of their kernel: the first of each in `make test`, the others nightly."""
    nightly = pytest.mark.nightly
    return [
        pytest.param(key, tile, id=f"{key}-{tile}", marks=() if tile is tiles[0] else nightly)
        for key, tiles in table.items()
        for tile in tiles
    ]


def description() -> str:
    """One line for the header of the test run."""
    absent = [f"{name} ({why()})" for name, why in dispatch.BACKENDS.items() if why() is not None]
    return f"backends: {', '.join(dispatch.available_backends())}; not here: {'; '.join(absent) or 'none'}"
