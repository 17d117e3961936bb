"""The layout of every result, in one place, so that each backend and the fake implementations agree on strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fpn_kernels import compatibility

# Types whose sizes are numbers, not symbols.  None in torch 2.10: its `suggest_memory_format`, which tracing uses,
# differs for maps of one pixel.
_PLAIN = () if compatibility.older_than((2, 11)) else (Tensor, torch.nn.Parameter)


def result_format(tensor: Tensor) -> torch.memory_format:
    """`torch.channels_last` where the 4-D tensor's strides are NHWC, else `torch.contiguous_format`.

    Slices of an NHWC map count as NHWC; any other order of dimensions (a transposed or an expanded map) as NCHW.
    """
    if type(tensor) in _PLAIN and tensor.layout == torch.strided and tensor.dim() == 4:
        return torch.channels_last if _is_nhwc(tensor.shape, tensor.stride()) else torch.contiguous_format
    return suggest_memory_format(tensor)


def _is_nhwc(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """`suggest_memory_format` for sizes that are numbers: 0.7 us instead of 2.7 us."""
    batch, channels, height, width = shape
    stride_n, stride_c, stride_y, stride_x = strides
    if stride_x < channels * stride_c or stride_c == 0:
        return False
    row, image = stride_x * width, stride_y * height
    # Maps of one channel and one pixel could be either; they count as NCHW.
    return stride_y >= row and stride_n >= image != stride_c and batch * channels * height * width > 0


def requested_format(tensor: Tensor, memory_format: torch.memory_format | None) -> torch.memory_format:
    """`memory_format`, or the format of `tensor` for None and `torch.preserve_format`."""
    if memory_format is None or memory_format == torch.preserve_format:
        return result_format(tensor)
    return memory_format


def allocate(shape: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised dense 4-D result with the dtype and device of `like`."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def allocator(shape: Sequence[int], memory_format: torch.memory_format) -> Callable[[Tensor], Tensor]:
    """A function that allocates results of one shape and layout, with the dtype and device of its argument.

    The strides are computed once: a result takes 1.5 us instead of 2.9 (one core of Zen 3).
    """
    strides = strides_of(shape, memory_format)
    return lambda like: like.new_empty_strided(shape, strides)


def strides_of(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    """The strides of a result that `allocate` returns."""
    return torch.empty(tuple(shape), dtype=torch.float32, device="meta", memory_format=memory_format).stride()
