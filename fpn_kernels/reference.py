"""The plain PyTorch twin of each operator: the baseline of the tests and the benchmarks.

The names, arguments and results are those of `fpn_kernels`; the code is that of a model without this library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _resize(top: Tensor, size: Sequence[int], mode: str) -> Tensor:
    align_corners = False if mode == "bilinear" else None
    return F.interpolate(top, size=tuple(size), mode=mode, align_corners=align_corners)


def upsample_add(top: Tensor, lateral: Tensor, *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    """``gain * (lateral + F.interpolate(top))``; see `fpn_kernels.upsample_add`."""
    merged = lateral + _resize(top, lateral.shape[2:], mode)
    return merged if gain == 1.0 else merged * gain


def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    top: Tensor | None = None,
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """``F.conv2d``, then `upsample_add`; see `fpn_kernels.lateral_connection`."""
    merged = F.conv2d(feature, weight.view(*weight.shape[:2], 1, 1), bias)
    if top is not None:
        merged = upsample_add(top, merged, mode=mode, gain=gain)
    return merged if memory_format == torch.preserve_format else merged.contiguous(memory_format=memory_format)


def output_conv(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """``F.conv2d`` with padding 1; see `fpn_kernels.output_conv`."""
    result = F.conv2d(feature, weight, bias, padding=1)
    return result if memory_format == torch.preserve_format else result.contiguous(memory_format=memory_format)


def top_down_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Tensor, ...]:
    """Chained lateral connections, finest first; see `fpn_kernels.top_down_pathway`."""
    merged: list[Tensor] = []
    for level in reversed(range(len(features))):
        merged.append(
            lateral_connection(
                features[level],
                weights[level],
                None if biases is None else biases[level],
                merged[-1] if merged else None,
                mode=mode,
                gain=gain,
                memory_format=memory_format,
            )
        )
    return tuple(reversed(merged))


def weighted_merge(
    inputs: Sequence[Tensor],
    weights: Tensor,
    *,
    normalization: str = "relu",
    eps: float = 1e-4,
    mode: str = "nearest",
) -> Tensor:
    """``sum(w[i] * F.interpolate(inputs[i]))``, as in BiFPN's published code; see `fpn_kernels.weighted_merge`."""
    if normalization == "softmax":
        factors = torch.softmax(weights, 0)
    else:
        factors = F.relu(weights)
        factors = factors / (factors.sum() + eps)
    size = inputs[0].shape[2:]
    merged = inputs[0] * factors[0]
    for other, factor in zip(inputs[1:], factors[1:], strict=True):
        merged = merged + (other if other.shape[2:] == size else _resize(other, size, mode)) * factor
    return merged


class FeaturePyramidNetwork(nn.Module):
    """The neck in plain PyTorch, with the `state_dict` keys of `fpn_kernels.FeaturePyramidNetwork`; no extra blocks.

    Args:
        in_channels_list: channels of each map, finest first.
        out_channels: channels of each output map.
        mode: upsampling mode of `torch.nn.functional.interpolate`.
        gain: factor on each merge.
    """

    def __init__(
        self, in_channels_list: Sequence[int], out_channels: int, *, mode: str = "nearest", gain: float = 1.0
    ) -> None:
        super().__init__()
        self.mode = mode
        self.gain = gain
        self.inner_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, out_channels, 1)) for channels in in_channels_list
        )
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels_list
        )

    def forward(self, x: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Maps by name, finest first, to output maps under the same names."""
        features = list(x.values())
        merged = self.inner_blocks[-1](features[-1])
        outputs = [self.layer_blocks[-1](merged)]
        for level in reversed(range(len(features) - 1)):
            lateral = self.inner_blocks[level](features[level])
            merged = upsample_add(merged, lateral, mode=self.mode, gain=self.gain)
            outputs.append(self.layer_blocks[level](merged))
        return OrderedDict(zip(x, reversed(outputs), strict=True))
