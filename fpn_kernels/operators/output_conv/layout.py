"""The layout of merged maps in a neck: the layout in which the 3x3 convolution is fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_kernels.operators import aten, dispatch
from fpn_kernels.operators.output_conv import OUTPUT_CONV


def best_format(feature: Tensor, *, recorded: bool = False) -> torch.memory_format:
    """The layout of a merged map in which `output_conv` is fastest on this machine, whatever the layout of its result.

    For the producer of the map: `lateral_connection` writes either layout without an extra pass.

    Args:
        feature: a map of the same batch, size, device and dtype, e.g. the backbone's map of that level.  Under
            autocast, autocast's dtype is used.
        recorded: whether autograd will record the convolution.

    Returns:
        `torch.contiguous_format`, `torch.channels_last`, or `torch.preserve_format` where it does not matter.
    """
    device_type, dtype = feature.device.type, feature.dtype
    # ATen's gradients on CUDA copy maps whose layout differs from the gradient's.  Forward and backward of the neck of
    # an NCHW image of 800 x 1280 took 1.51 ms on an H100 with NHWC maps inside, and eager 1.46; without gradients, 266
    # us and eager 540.
    if not aten.is_large(feature) or (recorded and device_type == "cuda"):
        return torch.preserve_format
    # Not every device type has autocast, and the compiler of torch 2.11 cannot list those that have.
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    return _best_format_for(device_type, dtype)


def _best_format_for(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    return dispatch.fastest_format(OUTPUT_CONV, device_type, dtype)


# A constant to torch.compile, which cannot trace the selection of backends: the compiled network is right with any
# layout.  `torch.compiler.assume_constant_result` sets this mark, too, but imports the whole compiler and Triton.
_best_format_for._dynamo_marked_constant = True  # type: ignore[attr-defined]
