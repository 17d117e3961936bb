"""Calls of one backend's implementation of an operator, without the dispatcher and the plan cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fpn_kernels.operators.operator import OPERATORS


def plan_of(backend: str, operator: str, *arguments: Any) -> Callable[..., Any]:
    """A plan as a function of arguments, which are those of the call record, in order."""
    chosen = OPERATORS[operator]
    run = chosen.backends[backend].plan(chosen.call(*arguments))
    return lambda *arguments: run(chosen.call(*arguments))


def refusal_of(backend: str, operator: str, *arguments: Any) -> str | None:
    chosen = OPERATORS[operator]
    return chosen.backends[backend].refusal(chosen.call(*arguments))


def opt_in_of(backend: str, operator: str, *arguments: Any) -> str | None:
    chosen = OPERATORS[operator]
    return chosen.backends[backend].opt_in(chosen.call(*arguments))


def by_native(operator: str, *arguments: Any) -> Any:
    """The result of an operator by the compiled library."""
    return plan_of("native", operator, *arguments)(*arguments)


def by_triton(operator: str, *arguments: Any) -> Any:
    """The result of an operator by Triton."""
    return plan_of("triton", operator, *arguments)(*arguments)
