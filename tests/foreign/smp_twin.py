"""segmentation_models_pytorch: the FPN decoder, its pyramid of `FPNBlock`s and a head after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FPNBlock(nn.Module):
    def __init__(self, pyramid_channels: int, skip_channels: int, interpolation_mode: str = "nearest") -> None:
        super().__init__()
        self.skip_conv = nn.Conv2d(skip_channels, pyramid_channels, 1)
        self.interpolation_mode = interpolation_mode

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.skip_conv(skip) + F.interpolate(x, scale_factor=2.0, mode=self.interpolation_mode)


class FPNDecoder(nn.Module):
    def __init__(self, encoder_channels: list[int], pyramid_channels: int, interpolation_mode: str = "nearest") -> None:
        super().__init__()
        c2, c3, c4, c5 = encoder_channels
        self.p5 = nn.Conv2d(c5, pyramid_channels, 1)
        for level, channels in ((4, c4), (3, c3), (2, c2)):
            self.add_module(f"p{level}", FPNBlock(pyramid_channels, channels, interpolation_mode))
        self.seg_blocks = nn.ModuleList(nn.Conv2d(pyramid_channels, 4, 3, padding=1) for _ in range(4))
        self.dropout = nn.Dropout2d(0.2, inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        c2, c3, c4, c5 = features[-4:]
        maps = [self.p5(c5)]
        for level, skip in ((4, c4), (3, c3), (2, c2)):
            maps.append(getattr(self, f"p{level}")(maps[-1], skip))
        heads = [F.interpolate(head(m), c2.shape[2:]) for head, m in zip(self.seg_blocks, maps, strict=True)]
        return self.dropout(torch.stack(heads).sum(0))
