"""The metadata of tensors that a launch depends on: strides, reach, alignment, the device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fpn_kernels import compatibility, resampling

INT32_REACH = 2**31 - 1

# Sixteen elements cover a 16-byte access in every dtype, and keep the number of compilations small.
_WIDEST = 16
_ALIGNED_BYTES = 16

# For the interpreter, where the number only shapes the grid.
_DEFAULT_SM_COUNT = 132


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides in elements, 0 along dimensions of size 1: PyTorch leaves those arbitrary."""
    return tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def needs_int64(*tensors: Tensor) -> bool:
    """Whether an offset inside any of the tensors exceeds int32."""
    return any(sum((n - 1) * s for n, s in zip(t.shape, strides(t), strict=True)) > INT32_REACH for t in tensors)


def common_divisor(tensor: Tensor, dim: int, *counts: int) -> int:
    """`alignment` of a tensor whose start is aligned, by its strides alone."""
    steps = strides(tensor)
    return math.gcd(_WIDEST, *steps[:dim], *steps[dim + 1 :], *counts) if steps[dim] == 1 else 0


def alignment(tensor: Tensor, dim: int, *counts: int) -> int:
    """How far a run of elements along `dim` may be vectorised: 0 where its stride is not 1, else 1 to 16 elements.

    It is the power of two that divides every other stride and each of `counts` (the bounds in masks), which Triton sees
    only at run time.  Triton itself specialises on the alignment of the start to 16 bytes.
    """
    divisor = common_divisor(tensor, dim, *counts)
    return 1 if divisor > 1 and tensor.data_ptr() % _ALIGNED_BYTES else divisor


def full_access(tensor: Tensor) -> int:
    """How many of the tensor's elements 16 bytes hold."""
    return _ALIGNED_BYTES // tensor.element_size()


def inner_axis(tensor: Tensor) -> str | None:
    """The axis along which a tensor descriptor reads or writes a map: "channels", "pixels", or None for neither.

    TMA requires that this axis has stride 1, that every other stride is a multiple of 16 bytes, and that the map begins
    at such a multiple.  Expanded maps, with a stride of 0, are left out: TMA is not documented to accept them.
    """
    return _axis_along(tensor, (("channels", 1), ("pixels", 3)))


def flat_axis(tensor: Tensor) -> str | None:
    """As `inner_axis`, of a map whose pixels are one axis."""
    return _axis_along(tensor.flatten(2), (("channels", 1), ("pixels", 2))) if pixels_are_flat(tensor) else None


def _axis_along(tensor: Tensor, axes: tuple[tuple[str, int], ...]) -> str | None:
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return None
    for axis, dim in axes:
        if alignment(tensor, dim, tensor.shape[dim]) >= full_access(tensor):
            return axis
    return None


def has_half_the_size(top: Tensor, fine: Tensor) -> bool:
    """Whether each pixel of the coarser map is read by two rows and two columns of the finer one."""
    return tuple(fine.shape[2:]) == (2 * top.shape[2], 2 * top.shape[3])


def rows_are_aligned(matrix: Tensor) -> bool:
    """Whether a tensor descriptor reads a matrix along its rows."""
    return alignment(matrix, 1, matrix.shape[1]) >= full_access(matrix) and matrix.stride(0) > 0


@functools.lru_cache(maxsize=4096)
def scale(in_size: int, out_size: int) -> float:
    """`resampling.scale`, cached."""
    return resampling.scale(in_size, out_size)


@functools.lru_cache(maxsize=4096)
def longest_window(in_size: int, out_size: int, mode: str) -> int:
    """The largest number of destination pixels that read one source pixel along an axis, exactly."""
    if mode == "bilinear":
        # The pixels between its two neighbours (`indexing.readers`), in the float32 steps of the kernels.
        destination = torch.arange(out_size, dtype=torch.float32, device="cpu")
        position = (destination + 0.5) * scale(in_size, out_size) - 0.5
        after = torch.bincount(position.floor().long() + 1, minlength=in_size + 1)
        return int((after[:-1] + after[1:]).max())
    return int(torch.bincount(resampling.source_index(in_size, out_size, mode)).max())


@functools.cache
def _sm_count(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(tensor: Tensor) -> int:
    """The SMs of the tensor's device."""
    return _sm_count(tensor.device.index) if tensor.is_cuda else _DEFAULT_SM_COUNT


def pixels_are_flat(tensor: Tensor) -> bool:
    """Whether the pixels of a plane lie one stride apart throughout, so that one index serves for both axes."""
    height, width = tensor.shape[2:]
    return height == 1 or width == 1 or tensor.stride(2) == width * tensor.stride(3)


def arithmetic_of(feature: Tensor) -> str:
    """How products are computed: "half", or "tf32" or "ieee" for float32, by PyTorch's switch for convolutions.

    Only tensor cores compute TF32.
    """
    if feature.dtype != torch.float32:
        return "half"
    return "tf32" if feature.is_cuda and compatibility.tf32_is_allowed() else "ieee"
