"""The calls that the Triton kernels can serve and leave to others unless they are forced, stated once each.

A kernel serves by default where `benchmarks/gpu.sh` has measured it faster than eager (an H100, compute capability 9.0,
bfloat16; float16 has the same sizes and rates), or where bytes alone decide and it moves fewer than PyTorch: merges,
sums and their gradients.  A product that nobody has timed may lose to cuDNN:

- `lateral_connection` with a merge reads and writes each map once, where PyTorch takes more passes for bias, resize and
  sum.  In 16 bits and as TF32 bytes decide (C2 of 800 x 1280 takes 114 and 57 operations per byte, where the H100 makes
  268 and 137 in the time of one): it serves on every GPU.
- Without a merge, and in bilinear mode, where the merge is a pass of its own, it saves the bias at most: it serves
  where it was measured.
- In float32 without TF32 operations decide, and the product was never timed: eager serves, with one merge.
- The same for maps that it would move by single elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.backends import convolution
from fpn_kernels.backends.layouts import requested_format
from fpn_kernels.backends.triton import eligibility, geometry

# A 3x3 convolution in tiles of 128 pixels by 128 channels, of 256 channels: 70 tiles (50 x 80 pixels) took 20.5 us
# where cuDNN with the bias took 21.2, and 24 of them (25 x 40) at best 18.0, cuDNN 15.9.
_FEWEST_TILES = 64
_TILE_PIXELS = _TILE_CHANNELS = 128
_FEWEST_CHANNELS = 256


def memory_bound(tensor: Tensor, *_: object) -> str | None:
    """Merges and their gradients: bytes decide, on every GPU and in every dtype."""
    return None if tensor.is_cuda else "the interpreter is there to check kernels"


def _unmeasured(tensor: Tensor) -> str | None:
    if not tensor.is_cuda:
        return memory_bound(tensor)
    major, minor = eligibility.capability(tensor.device.index)
    if major != 9:
        return f"only measured on compute capability 9.0; this is {major}.{minor}"
    return "only measured in 16 bits" if tensor.dtype == torch.float32 else None


def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> str | None:
    if not feature.is_cuda:
        return memory_bound(feature)
    if feature.dtype == torch.float32 and not convolution.tf32_is_allowed():
        return "its product in float32 without TF32 has not been timed"
    if _moves_single_elements(feature, weight, requested_format(feature, memory_format)):
        return "it would move single elements, which has not been timed (an odd count of channels or of NCHW pixels)"
    if top is not None and mode != "bilinear":
        return None
    reason = _unmeasured(feature)
    return None if reason is None else f"without a merge in the same pass it was {reason}"


def _moves_single_elements(feature: Tensor, weight: Tensor, out_format: torch.memory_format) -> bool:
    """Whether some tensor cannot be read or written by two elements at once: then the kernel's narrow tile serves."""
    divisor, pixels = geometry.common_divisor, feature.shape[2] * feature.shape[3]
    by_channels = divisor(feature, 1, feature.shape[1])
    by_pixels = divisor(feature.flatten(2), 2, pixels) if geometry.pixels_are_flat(feature) else 0
    of_weight = divisor(weight, 1, weight.shape[1]) or divisor(weight, 0, weight.shape[0])
    of_result = weight.shape[0] if out_format == torch.channels_last else pixels
    return max(by_channels, by_pixels) < 2 or of_weight < 2 or of_result % 2 == 1


def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> str | None:
    reason = _unmeasured(feature)
    if reason is not None:
        return reason
    if bias is None:
        return "cuDNN is faster where no bias is added"
    if min(weight.shape[:2]) < _FEWEST_CHANNELS:
        return f"only measured from {_FEWEST_CHANNELS} channels; these are {weight.shape[1]} to {weight.shape[0]}"
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
