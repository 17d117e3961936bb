"""Calls of the compiled library's implementation of an operator, without the dispatcher and the plan cache."""

from __future__ import annotations

from typing import Any

from fpn_kernels.operators.operator import OPERATORS


def by_native(operator: str, *arguments: Any) -> Any:
    """The result of an operator by the compiled library; the arguments are those of its call record, in order."""
    chosen = OPERATORS[operator]
    call = chosen.call(*arguments)
    return chosen.backends["native"].plan(call)(call)
