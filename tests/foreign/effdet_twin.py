"""EfficientDet: a cell of `FpnCombine` nodes, top-down and then bottom-up, over three levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Interpolate2d(nn.Module):
    def __init__(self, size: tuple[int, int] | None, scale_factor: float | None, mode: str) -> None:
        super().__init__()
        self.size, self.scale_factor, self.mode = size, scale_factor, mode
        self.align_corners = None if mode == "nearest" else False

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, self.scale_factor, self.mode, self.align_corners)


class ConvBnAct2d(nn.Module):
    def __init__(self, cin: int, cout: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 1, bias=not norm)
        self.bn = nn.BatchNorm2d(cout) if norm else None
        self.act = None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.bn is None else self.bn(self.conv(x))


class ResampleFeatureMap(nn.Sequential):
    def __init__(
        self, cin: int, cout: int, size: tuple[int, int], target: tuple[int, int], norm: bool, by: str, mode: str
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.input_size, self.output_size = cin, cout, size, target
        if cin != cout:
            self.add_module("conv", ConvBnAct2d(cin, cout, norm))
        if size > target:
            self.add_module("downsample", nn.MaxPool2d(3, 2, 1))
        elif size < target:
            upsample = Interpolate2d(target, None, mode) if by == "size" else Interpolate2d(None, 2.0, mode)
            self.add_module("upsample", upsample)


class FpnCombine(nn.Module):
    def __init__(self, offsets: list[int], resample: list[ResampleFeatureMap], weight_method: str) -> None:
        super().__init__()
        self.inputs_offsets, self.weight_method = offsets, weight_method
        self.resample = nn.ModuleDict({str(o): r for o, r in zip(offsets, resample, strict=True)})
        self.edge_weights = None if weight_method == "sum" else nn.Parameter(torch.rand(len(offsets)))

    def forward(self, x: list[Tensor]) -> Tensor:
        maps = [resample(x[o]) for o, resample in zip(self.inputs_offsets, self.resample.values(), strict=True)]
        weights = [1.0] * len(maps) if self.edge_weights is None else self.edge_weights.relu()
        return sum(w * m for w, m in zip(weights, maps, strict=True))


class BiFpnLayer(nn.Module):
    """Levels 0..2 in; nodes 3 (1 + up 2), 4 (0 + up 3), 5 (1 + 3 + down 4), 6 (2 + down 5) out."""

    def __init__(
        self,
        channels: list[int],
        width: int,
        sizes: list[tuple[int, int]],
        *,
        weight_method: str = "sum",
        norm: bool = False,
        by: str = "size",
        mode: str = "nearest",
    ) -> None:
        super().__init__()
        known = [*zip(channels, sizes, strict=True)]
        self.fnode = nn.ModuleList()
        for level, offsets in ((1, [1, 2]), (0, [0, 3]), (1, [1, 3, 4]), (2, [2, 5])):
            resample = [
                ResampleFeatureMap(known[o][0], width, known[o][1], sizes[level], norm, by, mode) for o in offsets
            ]
            self.fnode.append(FpnCombine(offsets, resample, weight_method))
            known.append((width, sizes[level]))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for node in self.fnode:
            x = [*x, node(x)]
        return x[-3:]
