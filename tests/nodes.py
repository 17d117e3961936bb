"""The nodes of a BiFPN: the maps that are merged, and their weights."""

from __future__ import annotations

import pytest
import torch
from samples import Sizes, random_map
from targets import Target
from torch import Tensor

# The maps of a node after the first one, by their size.
NODES = {
    "a top-down node": ("coarse",),
    "two of one size": ("fine",),
    "a bottom-up node": ("fine", "fine"),
    "a coarse map last": ("fine", "coarse"),
    "a coarse map in the middle": ("coarse", "fine"),
    "two coarse maps": ("coarse", "coarse"),
    "two coarse maps of two sizes": ("coarse", "point"),
}
UNEVEN = Sizes(2, 6, (3, 5), (7, 10), "small, uneven, and not one vector wide")


def maps(
    node: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: str = "cpu",
    layouts: tuple[str, ...] = ("nchw", "nchw", "nchw"),
    grad: bool = False,
) -> list[Tensor]:
    places = {"fine": sizes.fine, "coarse": sizes.top, "point": (1, 1)}
    return [
        random_map((sizes.batch, sizes.channels, *places[name]), dtype, device, layout).requires_grad_(grad)
        for name, layout in zip(("fine", *NODES[node]), layouts, strict=False)
    ]


def fusion_weights(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """One of three is negative: the ReLU switches it off."""
    return torch.tensor([0.7, 1.9, -0.4][:count], device=device, dtype=dtype, requires_grad=grad)


def spread(mode: str, *sizes: tuple[int, int]) -> int:
    """A bilinear position is rounded at its own size, and its weight by as much."""
    return max(map(max, sizes)) if mode == "bilinear" else 1


def require_node(target: Target, node: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
    """Skip a node that the backend leaves to eager."""
    target.require(dtype)
    places = {"coarse": sizes.top, "point": (1, 1), "fine": sizes.fine}
    if target.backend == "triton" and sum(places[name] != sizes.fine for name in NODES[node]) > 1:
        pytest.skip("triton leaves two maps to be resized to eager")
