"""The layout of every result, in one place, so that each backend and the fake implementations agree on strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def result_format(tensor: Tensor) -> torch.memory_format:
    """`torch.channels_last` where the 4-D tensor's strides say NHWC, else `torch.contiguous_format`.

    Slices of an NHWC map count as NHWC; any other order of dimensions (a transposed map, an expanded one) counts
    as NCHW.
    """
    if type(tensor) is Tensor:  # whose sizes are numbers; a subclass's may be symbols, which are not to be compared
        _, channels, height, width = tensor.shape
        if channels > 1 and height > 1 and width > 1:
            # Dense maps by the sight of their strides: 0.5 us, where the loop of `suggest_memory_format` takes 1.9.
            strides = tensor.stride()
            if strides[1:] == (height * width, width, 1):
                return torch.contiguous_format
            if strides == (height * width * channels, 1, width * channels, channels):
                return torch.channels_last
    return suggest_memory_format(tensor)


def requested_format(tensor: Tensor, memory_format: torch.memory_format | None) -> torch.memory_format:
    """The format asked for, or that of `tensor` where nothing, or `torch.preserve_format`, was asked for."""
    if memory_format is None or memory_format == torch.preserve_format:
        return result_format(tensor)
    return memory_format


def allocate(shape: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised dense 4-D result with the dtype and device of `like`."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)
