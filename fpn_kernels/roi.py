"""The level of the pyramid from which a region of interest is pooled."""

from __future__ import annotations

import torch
from torch import Tensor

# Detectors differ in the value and the place of the epsilon for boundary areas.
CONVENTIONS = ("torchvision", "detectron2", "mmdetection")


def assign_levels(
    boxes: Tensor,
    *,
    levels: tuple[int, int] = (2, 5),
    canonical_level: int = 4,
    canonical_size: float = 224,
    convention: str = "torchvision",
) -> Tensor:
    """Assigns each box to a level: ``floor(canonical_level + log2(sqrt(w h) / canonical_size))``, clamped.

    With s = sqrt(w h), k0 and s0 the canonical level and size, and kmin the first of `levels`, the conventions are

    - ``"torchvision"``: ``floor(k0 + log2(s / s0) + 1e-6)``
    - ``"detectron2"``: ``floor(k0 + log2(s / s0 + 1e-8))``
    - ``"mmdetection"``: ``kmin + floor(log2(s / (s0 / 2**(k0 - kmin)) + 1e-6))``

    Args:
        boxes: ``[K, 4]`` as x1, y1, x2, y2, of any floating-point or integer dtype; K may be 0.
        levels: the finest and the coarsest level.
        canonical_level: the level of a box of the canonical size.
        canonical_size: the side of a square box at the canonical level.
        convention: the rounding of a detector; see above.

    Returns:
        int64 ``[K]``, level numbers from ``levels[0]`` to ``levels[1]``.  Computed in float32 for every dtype of
        `boxes`, as in the detectors.  A box without area (``x2 <= x1`` or ``y2 <= y1``) or with a NaN goes to the
        finest level, an infinite box to the coarsest.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `boxes` is not ``[K, 4]``, `levels` is not an ascending pair, `canonical_size` is not positive, or
            `convention` is unknown.

    Dtypes and layout:
        Boxes of any real dtype (float16, bfloat16, float32, float64, the integers) and any strides, on any device;
        computed by PyTorch.  Not differentiable: a level is a whole number.

    Cost:
        ``16 K`` bytes of float32 boxes read and ``8 K`` bytes written, plus the temporaries of eager PyTorch.

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, equation 1; the conventions are those of torchvision's
        `MultiScaleRoIAlign`, Detectron2's `ROIPooler` and MMDetection's `SingleRoIExtractor`.
    """
    finest, coarsest = _check(boxes, levels, canonical_level, canonical_size, convention)
    corners = boxes.to(torch.float32)
    # Clamped, since two negative sides would give a positive area.
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=0)
    size = (sides[:, 0] * sides[:, 1]).sqrt()
    if convention == "torchvision":
        level = torch.floor(canonical_level + torch.log2(size / canonical_size) + 1e-6)
    elif convention == "detectron2":
        level = torch.floor(canonical_level + torch.log2(size / canonical_size + 1e-8))
    else:
        finest_size = canonical_size / 2 ** (canonical_level - finest)
        level = finest + torch.floor(torch.log2(size / finest_size + 1e-6))
    return torch.nan_to_num(level, nan=float(finest)).clamp(finest, coarsest).to(torch.int64)


def _check(
    boxes: Tensor, levels: tuple[int, int], canonical_level: int, canonical_size: float, convention: str
) -> tuple[int, int]:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes: expected a tensor, got {type(boxes).__name__}")
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"boxes: expected real numbers, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected the shape [K, 4] (x1, y1, x2, y2), got {list(boxes.shape)}")
    if not isinstance(levels, (tuple, list)) or len(levels) != 2 or not all(isinstance(k, int) for k in levels):
        raise TypeError(f"levels: expected two integers, the finest level and the coarsest, got {levels!r}")
    if levels[0] > levels[1]:
        raise ValueError(f"levels: expected the finest level before the coarsest, got {tuple(levels)}")
    if not isinstance(canonical_level, int) or isinstance(canonical_level, bool):
        raise TypeError(f"canonical_level: expected an integer, got {type(canonical_level).__name__}")
    if not isinstance(canonical_size, (int, float)) or isinstance(canonical_size, bool):
        raise TypeError(f"canonical_size: expected a number, got {type(canonical_size).__name__}")
    if not canonical_size > 0:
        raise ValueError(f"canonical_size: expected a positive number, got {canonical_size}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    return levels[0], levels[1]
