"""Source indices of `torch.nn.functional.interpolate`, and their inverse ranges, for all backends.

Eager PyTorch computes the nearest index in *float32* (`nearest_neighbor_compute_source_index` in ATen's `UpSample.h`).
Rounding matters: for 1,619 of the 79,401 pairs in < 200, out < 400 the index is not the rational ``dst * in // out``.

Eager has several formulas (measured on torch 2.13, CPU).  Large contiguous float64 maps index in float64 in "nearest",
and large contiguous maps of any dtype use a third formula in "nearest-exact".  Small maps, channels-last maps of at
least four channels and the backward use the float32 formula.  This library uses the float32 formula for every dtype,
size and layout, so that a result does not depend on the layout, and the backward is the exact adjoint.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

NEAREST_MODES = ("nearest", "nearest-exact")
MODES = (*NEAREST_MODES, "bilinear")


def scale(in_size: int, out_size: int) -> float:
    """Source pixels per destination pixel, ``float32(in) / float32(out)``, as a Python float."""
    return _float32(_float32(in_size) / _float32(out_size))


def source_index(in_size: int, out_size: int, mode: str = "nearest", device: torch.device | str = "cpu") -> Tensor:
    """The source pixel of each destination pixel along one axis, in the nearest modes.

    ``nearest``: ``min(floor(dst * scale), in - 1)``; ``nearest-exact``: ``min(floor((dst + 0.5) * scale), in - 1)``,
    both in float32.

    Returns:
        int64 tensor ``[out_size]``, non-decreasing.
    """
    destination = torch.arange(out_size, dtype=torch.float32, device=device)
    if mode == "nearest-exact":
        destination = destination + 0.5
    elif mode != "nearest":
        raise ValueError(f"mode: a source index is defined for {NEAREST_MODES}, got {mode!r}")
    return (destination * scale(in_size, out_size)).floor().long().clamp(max=in_size - 1)


def source_ranges(source: Tensor, in_size: int) -> tuple[Tensor, Tensor]:
    """The half-open range of destination pixels that read each source pixel: the inverse of `source_index`.

    Args:
        source: a non-decreasing ``source_index`` result, ``[out_size]``.
        in_size: the number of source pixels.

    Returns:
        ``(start, stop)``, int64 ``[in_size]`` each; an empty range if no destination pixel reads the source pixel.
    """
    edges = torch.searchsorted(source, torch.arange(in_size + 1, dtype=torch.int64, device=source.device))
    return edges[:-1], edges[1:]


def bilinear_weights(
    in_size: int, out_size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels of each destination pixel and the weight of the second (align_corners=False).

    ``src = max(scale * (dst + 0.5) - 0.5, 0)``, in float64 if `dtype` is float64, else in float32.

    Returns:
        ``(lower, upper, weight_of_upper)``: int64, int64 and `dtype`, ``[out_size]`` each.
    """
    destination = torch.arange(out_size, dtype=dtype, device=device)
    ratio = in_size / out_size if dtype == torch.float64 else scale(in_size, out_size)
    source = ((destination + 0.5) * ratio - 0.5).clamp(min=0)
    lower = source.long().clamp(max=in_size - 1)
    return lower, (lower + 1).clamp(max=in_size - 1), source - lower


def longest_range(in_size: int, out_size: int) -> int:
    """An upper bound on the number of destination pixels that read one source pixel.

    One more than the rational bound, because a float32 index may be off by one pixel to either side.
    """
    return min(-(-out_size // in_size) + 1, out_size)


@functools.lru_cache(maxsize=1024)
def indices_agree(in_size: int, out_size: int, mode: str, dtype: torch.dtype) -> bool:
    """Whether eager PyTorch's CPU forward certainly reads the pixels of `source_index` along one axis.

    Its second path, for contiguous maps above some size, computes in the dtype of its accumulators (measured: float64
    maps with more than 128 rows and columns together).  In "nearest" this is ``floor(float32(dst * scale))``, which for
    float32 accumulators is the usual formula.  In "nearest-exact" it subtracts and adds a half around the product, so
    its floor is certain only if the position is not close to a whole number.
    """
    if in_size == out_size or (mode == "nearest" and dtype != torch.float64):
        return True
    destination = torch.arange(out_size, dtype=torch.float64, device="cpu")
    if mode == "nearest-exact":
        position = (destination + 0.5) * (in_size / out_size)
        clearance = (position - position.round()).abs()
        return bool((clearance > 4 * torch.finfo(torch.float32).eps * position.clamp(min=1)).all())
    second = (destination * (in_size / out_size)).float().floor().long().clamp(max=in_size - 1)
    return torch.equal(second, source_index(in_size, out_size, mode))


def _float32(value: float) -> float:
    """Round to float32.  A float64 product or quotient of float32 values rounds to the float32 result."""
    return ctypes.c_float(value).value


@functools.lru_cache(maxsize=1024)
def formulas_agree(in_size: int, out_size: int) -> bool:
    """Whether the other common formulas of the "nearest" index equal `source_index` along one axis.

    These are the rational ``dst * in // out``, and ONNX's ``floor(dst / scale)`` with ``scale = float32(out / in)``.
    Computed on Python's numbers, since a tensor has no values while a program is traced.
    """
    ratio, inverse = _float32(in_size / out_size), _float32(out_size / in_size)
    last = in_size - 1
    return all(
        min(int(_float32(dst * ratio)), last) == min(int(_float32(dst / inverse)), last) == dst * in_size // out_size
        for dst in range(out_size)
    )
