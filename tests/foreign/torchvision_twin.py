"""torchvision: `FeaturePyramidNetwork`, its extra blocks, and the backbone that holds it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, cin: int, cout: int, kernel: int, norm_layer: Callable[[int], nn.Module] | None) -> None:
        parts: list[nn.Module] = [nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=norm_layer is None)]
        super().__init__(*parts, *([] if norm_layer is None else [norm_layer(cout)]))


class LastLevelMaxPool(nn.Module):
    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return [*results, results[-1][:, :, ::2, ::2]], [*names, "pool"]


class LastLevelP6P7(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.p6, self.p7 = nn.Conv2d(cin, cout, 3, 2, 1), nn.Conv2d(cout, cout, 3, 2, 1)
        self.use_P5 = cin == cout

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(results[-1] if self.use_P5 else x[-1])
        return [*results, p6, self.p7(p6.relu())], [*names, "p6", "p7"]


class FeaturePyramidNetwork(nn.Module):
    """torchvision's class, with this library's options `mode` and `fuse_type`."""

    _version = 2

    def __init__(
        self,
        in_channels_list: list[int],
        out_channels: int,
        extra_blocks: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        mode: str = "nearest",
        fuse_type: str = "sum",
    ) -> None:
        super().__init__()
        self.mode, self.fuse_type = mode, fuse_type
        self.inner_blocks, self.layer_blocks = nn.ModuleList(), nn.ModuleList()
        for cin in in_channels_list:
            self.inner_blocks.append(Conv2dNormActivation(cin, out_channels, 1, norm_layer))
            self.layer_blocks.append(Conv2dNormActivation(out_channels, out_channels, 3, norm_layer))
        for conv in [m for m in self.modules() if isinstance(m, nn.Conv2d)]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.extra_blocks = extra_blocks

    def get_result_from_inner_blocks(self, x: Tensor, idx: int) -> Tensor:
        return self.inner_blocks[idx](x)

    def get_result_from_layer_blocks(self, x: Tensor, idx: int) -> Tensor:
        return self.layer_blocks[idx](x)

    def forward(self, x: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        names, maps = list(x), list(x.values())
        merged = self.get_result_from_inner_blocks(maps[-1], -1)
        results = [self.get_result_from_layer_blocks(merged, -1)]
        for level in reversed(range(len(maps) - 1)):
            lateral = self.get_result_from_inner_blocks(maps[level], level)
            align = False if self.mode == "bilinear" else None
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode=self.mode, align_corners=align)
            merged = merged / 2 if self.fuse_type == "avg" else merged
            results.insert(0, self.get_result_from_layer_blocks(merged, level))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


class BackboneWithFPN(nn.Module):
    """A strided convolution per level, and the pyramid at `fpn`."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip([3, *channels], channels, strict=False))
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool())

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        maps = {}
        for level, block in enumerate(self.body):
            image = block(image).relu()
            maps[str(level)] = image
        return self.fpn(maps)
