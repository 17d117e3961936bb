"""SAM 2: `FpnNeck`, which enlarges in float32 and merges only some levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class PositionEncoding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().cos()


class FpnNeck(nn.Module):
    def __init__(
        self,
        position_encoding: nn.Module,
        d_model: int,
        backbone_channel_list: list[int],
        kernel_size: int = 1,
        fpn_interp_model: str = "bilinear",
        fuse_type: str = "sum",
        fpn_top_down_levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.position_encoding, self.fpn_interp_model, self.fuse_type = position_encoding, fpn_interp_model, fuse_type
        self.convs = nn.ModuleList()
        for channels in backbone_channel_list:
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(channels, d_model, kernel_size, padding=kernel_size // 2))
            self.convs.append(block)
        levels = range(len(self.convs)) if fpn_top_down_levels is None else fpn_top_down_levels
        self.fpn_top_down_levels = list(levels)

    def forward(self, xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        assert len(xs) == len(self.convs)
        maps: list[Tensor] = []
        encodings: list[Tensor] = []
        align = None if self.fpn_interp_model == "nearest" else False
        for conv, level in zip(self.convs, reversed(range(len(xs))), strict=True):
            merged = conv(xs[level])
            if maps and level in self.fpn_top_down_levels:
                top = F.interpolate(maps[0].float(), scale_factor=2.0, mode=self.fpn_interp_model, align_corners=align)
                merged = merged + top
                merged = merged / 2 if self.fuse_type == "avg" else merged
            maps.insert(0, merged)
            encodings.insert(0, self.position_encoding(merged).to(merged.dtype))
        return maps, encodings
