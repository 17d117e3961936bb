"""`assign_levels` of any boxes against each detector's formula in float64, wherever its own float32 is sure."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import strategies  # noqa: F401 - loads the profile
from hypothesis import given, settings
from hypothesis import strategies as st

import fpn_kernels
from fpn_kernels.roi import CONVENTIONS

_coordinates = st.one_of(
    st.integers(-64, 2048).map(float),
    st.floats(-2048, 4096, width=32),
    st.floats(width=32),
)
_special = st.sampled_from((math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45))


@st.composite
def _squares(draw: st.DrawFn) -> tuple[float, ...]:
    """At, just below and just above the area where a level begins."""
    side = draw(st.sampled_from((56.0, 224.0, 100.5, 512.0))) * 2.0 ** draw(st.integers(-4, 4))
    side *= 1 + draw(st.sampled_from((0.0, -5e-4, 5e-4, -1e-4, 1e-4)))
    return tuple(torch.tensor([0.0, 0.0, side, side]).tolist())


_boxes = st.lists(
    st.one_of(_squares(), st.tuples(*[_coordinates] * 4), st.tuples(*[st.one_of(_coordinates, _special)] * 4)),
    max_size=8,
)


def _position(box: tuple[float, ...], k0: int, s0: float, finest: int, convention: str) -> float:
    """The level before it is rounded down: NaN where a box has none."""
    x1, y1, x2, y2 = box
    # Sides are float32 differences: two large numbers may be one apart, or overflow.
    sides = (torch.tensor([x2, y2]) - torch.tensor([x1, y1])).double().tolist()
    if any(math.isnan(side) or side <= 0 for side in sides):
        return math.nan
    size = math.sqrt(sides[0] * sides[1])
    # The area is a float32 number, and so is the root: what float32 cannot hold is nothing, or without bound.
    area = float(torch.tensor(sides[0] * sides[1], dtype=torch.float64).float())
    if area == 0 or math.isinf(area):
        return math.nan if area == 0 else math.inf
    if convention == "torchvision":
        return k0 + math.log2(size / s0) + 1e-6
    if convention == "detectron2":
        return k0 + math.log2(size / s0 + 1e-8)
    return finest + math.log2(size / (s0 / 2 ** (k0 - finest)) + 1e-6)


@settings(max_examples=4 * settings().max_examples)  # they cost little
@given(
    boxes=_boxes,
    convention=st.sampled_from(CONVENTIONS),
    finest=st.integers(-1, 5),
    more=st.integers(0, 4),
    k0=st.integers(2, 6),
    s0=st.sampled_from((56, 224, 100.5, 512)),
)
def test_assign_levels(
    boxes: list[tuple[float, ...]], convention: str, finest: int, more: int, k0: int, s0: float
) -> None:
    levels = (finest, finest + more)
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    before = tensor.clone()
    options = {"levels": levels, "canonical_level": k0, "canonical_size": s0, "convention": convention}
    result = fpn_kernels.assign_levels(tensor, **options)
    assert result.dtype == torch.int64 and result.shape == (len(boxes),)
    torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
    for box, level in zip(boxes, result.tolist(), strict=True):
        position = _position(box, k0, s0, finest, convention)
        if math.isnan(position):
            assert level == levels[0], box
            continue
        # float32 is sure of a level but at its edge; a level is up to some twenty, its rounding 1e-6 of it.
        lowest, highest = (
            levels[1] if math.isinf(position) else min(max(math.floor(position + edge), levels[0]), levels[1])
            for edge in (-2e-5, 2e-5)
        )
        assert lowest <= level <= highest, (box, position)
    # Each box by itself, in wider numbers and in another layout, goes to the same level.
    alone = [int(fpn_kernels.assign_levels(tensor[i : i + 1], **options)) for i in range(len(boxes))]
    assert alone == result.tolist()
    strided = torch.stack((tensor, tensor), dim=2)[:, :, 0].double()
    assert torch.equal(fpn_kernels.assign_levels(strided, **options), result)
