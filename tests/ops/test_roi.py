"""`assign_levels` against each convention written as its detector writes it, and at the boundary areas."""

from __future__ import annotations

import pytest
import torch

import fpn_kernels
from fpn_kernels.roi import CONVENTIONS


def _square(side: float) -> torch.Tensor:
    return torch.tensor([[3.0, 5.0, 3.0 + side, 5.0 + side]])


def _torchvision(boxes: torch.Tensor, k_min: int = 2, k_max: int = 5, s0: int = 224, lvl0: int = 4) -> torch.Tensor:
    s = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    target = torch.floor(lvl0 + torch.log2(s / s0) + torch.tensor(1e-6, dtype=s.dtype))
    return torch.clamp(target, min=k_min, max=k_max).to(torch.int64)


def _detectron2(boxes: torch.Tensor) -> torch.Tensor:
    s = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    return torch.clamp(torch.floor(4 + torch.log2(s / 224 + 1e-8)), min=2, max=5).to(torch.int64)


def _mmdetection(boxes: torch.Tensor) -> torch.Tensor:
    s = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    return torch.floor(torch.log2(s / 56 + 1e-6)).clamp(min=0, max=3).long() + 2


TWINS = {"torchvision": _torchvision, "detectron2": _detectron2, "mmdetection": _mmdetection}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equals_the_detectors_own_formula(convention: str) -> None:
    corners = torch.rand(10_000, 2) * 500
    boxes = torch.cat([corners, corners + torch.rand(10_000, 2) * 900 + 1e-3], dim=1)
    levels = fpn_kernels.assign_levels(boxes, convention=convention)
    assert torch.equal(levels, TWINS[convention](boxes))
    assert set(levels.tolist()) == {2, 3, 4, 5}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("side", "level"), [(56, 2), (112, 3), (224, 4), (448, 5), (896, 5), (28, 2)])
def test_a_boundary_area_belongs_to_the_coarser_level(side: int, level: int, convention: str) -> None:
    assert fpn_kernels.assign_levels(_square(side), convention=convention).tolist() == [level]
    # The same area, not square, and just below it.
    box = torch.tensor([[0.0, 0.0, side * 2.0, side / 2.0]])
    assert fpn_kernels.assign_levels(box, convention=convention).tolist() == [level]
    below = fpn_kernels.assign_levels(_square(side * 0.999), convention=convention).tolist()
    assert below == [max(2, min(5, level - 1 if side <= 448 else level))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_the_arithmetic_is_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    """A 512-pixel box has an area beyond float16, and 2**-6 beyond bfloat16's digits."""
    boxes = torch.tensor([[0, 0, 512, 512], [0, 0, 224, 224], [8, 8, 120, 120]], dtype=dtype)
    levels = fpn_kernels.assign_levels(boxes)
    assert levels.tolist() == [5, 4, 3]
    assert levels.dtype == torch.int64


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_empty_and_degenerate_boxes(convention: str) -> None:
    assert fpn_kernels.assign_levels(torch.zeros(0, 4), convention=convention).shape == (0,)
    infinity, nan = float("inf"), float("nan")
    boxes = torch.tensor(
        [[5.0, 5, 5, 900], [900.0, 900, 5, 5], [0, 0, infinity, 10], [0, nan, 500, 500], [9.0, 9, 5, 900]]
    )
    assert fpn_kernels.assign_levels(boxes, convention=convention).tolist() == [2, 2, 5, 2, 2]


def test_other_levels_and_canonical_sizes() -> None:
    boxes = torch.cat([_square(side) for side in (8, 16, 64, 512, 4096)])
    assert fpn_kernels.assign_levels(boxes, levels=(3, 7)).tolist() == [3, 3, 3, 5, 7]
    assert fpn_kernels.assign_levels(boxes, canonical_size=64, canonical_level=3).tolist() == [2, 2, 3, 5, 5]
    mmdetection = fpn_kernels.assign_levels(boxes, levels=(3, 6), canonical_size=64, convention="mmdetection")
    assert mmdetection.tolist() == [3, 3, 4, 6, 6]


BAD = {
    "a list": (([[0, 0, 1, 1]],), {}, TypeError, "boxes: expected a tensor, got list"),
    "flags": ((torch.ones(1, 4, dtype=torch.bool),), {}, TypeError, "boxes: expected real numbers, got torch.bool"),
    "rank": ((torch.zeros(4),), {}, ValueError, r"boxes: expected the shape \[K, 4\].*got \[4\]"),
    "columns": ((torch.zeros(2, 5),), {}, ValueError, r"boxes: .*got \[2, 5\]"),
    "levels": ((torch.zeros(1, 4),), {"levels": (5, 2)}, ValueError, r"levels: .*got \(5, 2\)"),
    "three levels": ((torch.zeros(1, 4),), {"levels": (2, 3, 4)}, TypeError, "levels: expected two integers"),
    "level": ((torch.zeros(1, 4),), {"canonical_level": 4.5}, TypeError, "canonical_level: .*got float"),
    "size": ((torch.zeros(1, 4),), {"canonical_size": 0}, ValueError, "canonical_size: .*positive number, got 0"),
    "type of size": ((torch.zeros(1, 4),), {"canonical_size": "224"}, TypeError, "canonical_size: .*got str"),
    "convention": ((torch.zeros(1, 4),), {"convention": "paper"}, ValueError, "convention: expected one of.*'paper'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    arguments, keywords, error, message = BAD[case]
    with pytest.raises(error, match=message):
        fpn_kernels.assign_levels(*arguments, **keywords)


def test_compiles_without_a_break() -> None:
    compiled = torch.compile(fpn_kernels.assign_levels, fullgraph=True, dynamic=True, backend="eager")
    boxes = torch.cat([_square(side) for side in (10, 112, 300, 999)])
    assert torch.equal(compiled(boxes), fpn_kernels.assign_levels(boxes))
