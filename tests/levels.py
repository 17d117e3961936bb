"""The levels of instructions that the compiled library chooses from at run time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fpn_kernels.operators import plan_cache

# By the numbers of `torch.ops.fpn_kernels_native.limit_level`.
LEVELS = {0: "portable", 1: "avx2", 2: "avx512", 3: "amx"}
PORTABLE, AVX2, AVX512, AMX = LEVELS


def limit(level: int) -> int:
    """Forbids what is above a level; the level then in use."""
    used: int = torch.ops.fpn_kernels_native.limit_level(level)
    plan_cache.clear()  # what was prepared for another level
    return used


@contextmanager
def limited(level: int) -> Iterator[int]:
    """Within it nothing above a level is used; gives the level that is."""
    try:
        yield limit(level)
    finally:
        limit(max(LEVELS))


def here() -> list[int]:
    """The levels that this CPU has."""
    try:
        return [level for level in LEVELS if limit(level) == level]
    finally:
        limit(max(LEVELS))
