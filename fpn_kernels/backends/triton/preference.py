"""What the Triton kernels can serve and leave to others unless they are forced, stated once each.

By what `benchmarks/gpu.sh` measured on an H100 (compute capability 9.0), on the device, against cuDNN and against the
launches of one level after another; what nobody has measured counts as slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.backends.triton import eligibility

# A 3x3 convolution in tiles of 128 pixels by 128 channels, of 256 channels: 70 tiles (50 x 80 pixels) took 20.5 us
# where cuDNN with the bias took 21.2, and 24 of them (25 x 40) at best 18.0, cuDNN 15.9.
_FEWEST_TILES = 64
_TILE_PIXELS = _TILE_CHANNELS = 128
_FEWEST_CHANNELS = 256


def _unmeasured(tensor: Tensor) -> str | None:
    if not tensor.is_cuda:
        return "the interpreter is there to check kernels"
    major, minor = eligibility.capability(tensor.device.index)
    if major != 9:
        return f"measured on compute capability 9.0 alone, got {major}.{minor}"
    return "measured in 16 bits alone" if tensor.dtype == torch.float32 else None


def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> str | None:
    reason = _unmeasured(feature)
    if reason is not None:
        return reason
    if bias is None:
        return "cuDNN is faster where no bias is to be added"
    if min(weight.shape[:2]) < _FEWEST_CHANNELS:
        return f"not measured below {_FEWEST_CHANNELS} channels, got {weight.shape[1]} to {weight.shape[0]}"
    pixels = feature.shape[0] * feature.shape[2] * feature.shape[3]
    tiles = -(-pixels // _TILE_PIXELS) * -(-weight.shape[0] // _TILE_CHANNELS)
    return None if tiles >= _FEWEST_TILES else f"cuDNN is faster on so small a map, of {pixels} pixels"


def channel_sums(source: Tensor) -> str | None:
    """PyTorch's took 141 us for the five sums of a neck of one image (44 MB: 0.3 TB/s), with eight 354 us (1.0 TB/s).

    This one has not been measured by itself; `merge_backward`'s gather, which makes the same partial sums beside a map
    that it writes, moved 1.3 and 2.2 TB/s.
    """
    return _unmeasured(source)


def output_conv_format(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    """The layout of the maps that the 3x3 kernel reads, where it is what serves; its results have either."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return torch.preserve_format
    major, _ = eligibility.capability(torch.cuda.current_device())
    return torch.channels_last if major == 9 else torch.preserve_format


def output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    memory_format: torch.memory_format | None,
) -> str | None:
    """The largest level decides: the small ones take what its last tiles leave idle."""
    levels = [output_conv(*level, memory_format) for level in zip(features, weights, biases, strict=True)]
    return None if None in levels else f"level 0: {levels[0]}"


def top_down_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> str | None:
    """Four levels of 800 x 1280: 63.5 us, one after another 74.1; eight images 418 and 433."""
    return _unmeasured(features[0])
