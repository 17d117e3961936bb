"""The nodes of a BiFPN: which maps are merged, with which weights, and what float64 makes of the weights."""

from __future__ import annotations

import pytest
import torch
from samples import Sizes, random_map
from targets import Target
from torch import Tensor

from fpn_kernels import resampling

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = list(resampling.MODES)
NORMALIZATIONS = ["relu", "softmax"]

# The maps of a node after the first one, by the size of theirs.
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
    """One of three is negative: it is switched off by the ReLU."""
    return torch.tensor([0.7, 1.9, -0.4][:count], device=device, dtype=dtype, requires_grad=grad)


def exact_factors(weights: Tensor, normalization: str = "relu", eps: float = 1e-4) -> Tensor:
    """The paper's formulas in float64; "none" says that the weights are the factors."""
    weights = weights.double().cpu()
    if normalization == "none":
        return weights
    kept = weights.clamp(min=0) if normalization == "relu" else weights.exp()
    return kept / (kept.sum() + (eps if normalization == "relu" else 0))


def spread(mode: str, *sizes: tuple[int, int]) -> int:
    """A bilinear position is rounded at its own size, and its weight by as much."""
    return max(map(max, sizes)) if mode == "bilinear" else 1


def require_node(target: Target, node: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
    """Skips what the backend leaves to eager (`test_triton_leaves_two_coarse_maps_to_eager` shows that it says so)."""
    target.require(dtype)
    places = {"coarse": sizes.top, "point": (1, 1), "fine": sizes.fine}
    if target.backend == "triton" and sum(places[name] != sizes.fine for name in NODES[node]) > 1:
        pytest.skip("triton leaves two maps to be resized to eager")
