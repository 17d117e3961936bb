"""What the operators over all levels of a pyramid have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fpn_kernels.backends import serving


def by_level(biases: Sequence[Tensor], levels: Sequence[int], count: int) -> list[Tensor | None]:
    """One bias or None a level."""
    if len(biases) != len(levels):
        raise ValueError(f"bias_levels: expected one a bias, {len(biases)}, got {list(levels)}")
    placed: list[Tensor | None] = [None] * count
    for bias, level in zip(biases, levels, strict=True):
        if not 0 <= level < count:
            raise ValueError(f"bias_levels: expected levels below {count}, got {list(levels)}")
        placed[level] = bias
    return placed


def likeness(
    operator: str,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *options: object,
) -> tuple[object, ...] | None:
    """As `serving.likeness`, of a call over all levels; None where there is no level."""
    if not features:
        return None
    counts = (len(features), len(weights), *bias_levels)
    return serving.likeness_of(operator, (*features, *weights, *biases), (*counts, *options))


def remember(key: tuple[object, ...] | None, prepared: list[serving.Prepared]) -> None:
    """What computes each level, where no backend has the operator as a whole."""
    if not any(level.transient for level in prepared):
        serving.remember(key, prepared)
