"""Comparing the outputs of two runs, whatever containers they come in."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two outputs differ.

    Attributes:
        where: the place in the output: "['p3']", "[0][2]".
        what: the difference, in words.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"output{self.where}: {self.what}" if self.where else self.what


def roundoff(*dtypes: torch.dtype, tf32: bool = False) -> float:
    """The relative error of one rounding, in the least precise dtype that takes part."""
    unit = max(torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.is_floating_point)
    return max(unit, 2.0**-11) if tf32 else unit


def tolerance(*dtypes: torch.dtype, tf32: bool = False) -> float:
    """The relative error that two right implementations may show, of the least precise dtype that takes part.

    In 16 bits (and TF32) each implementation rounds where it likes, a few times a level; in float32 and float64
    they differ by the order of their sums.
    """
    unit = roundoff(*dtypes, tf32=tf32)
    return (8 if unit >= 2.0**-12 else 512) * unit


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the Euclidean norm; equal infinities and NaN in the same place are no error."""
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, actual - expected).norm()
    scale = torch.where(expected.isfinite(), expected, 0.0).norm()
    error = float(difference / scale.clamp(min=torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def first_difference(
    actual: Any, expected: Any, limit: float | None = None, *, tf32: bool = False
) -> Difference | None:
    """The first place where two nested outputs differ by more than `limit`, or None.

    Args:
        actual: tensors in any nesting of lists, tuples and mappings.
        expected: the same.
        limit: the largest relative error of a map; None for the `tolerance` of its dtype.
        tf32: as in `tolerance`.
    """
    actual_leaves, actual_spec = pytree.tree_flatten_with_path(actual)
    expected_leaves, expected_spec = pytree.tree_flatten_with_path(expected)
    if actual_spec != expected_spec:
        return Difference("", f"the output is {actual_spec}, but was {expected_spec}")
    for (path, left), (_, right) in zip(actual_leaves, expected_leaves, strict=True):
        where = pytree.keystr(path)
        if not isinstance(right, Tensor):
            if left is not right and left != right:
                return Difference(where, f"is {left!r}, but was {right!r}")
            continue
        for aspect in ("shape", "dtype", "device"):
            if getattr(left, aspect) != getattr(right, aspect):
                return Difference(where, f"has {aspect} {getattr(left, aspect)}, but had {getattr(right, aspect)}")
        exact = not right.is_floating_point()
        bound = 0.0 if exact else tolerance(right.dtype, tf32=tf32) if limit is None else limit
        error = relative_error(left, right)
        if error > bound:
            return Difference(where, f"relative error {error:.3g}, above {bound:.3g} ({right.dtype})")
    return None
