"""ResNets with their pyramids in plain PyTorch, with the names of published networks.

`width` makes them small enough for a test (published: 64).
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from foreign import detectron2_twin
from torch import Tensor, nn

OUT = 12


class _SingleFileBottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Conv2d(inplanes, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes, 3, stride, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, 4 * planes, 1, bias=False),
            nn.BatchNorm2d(4 * planes),
        )
        self.downsample = None
        if stride != 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bottleneck(x) + identity)


class _KuangliuBottleneck(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_planes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != 4 * planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class NamedLayersFPN(nn.Module):
    """`toplayer`, `latlayer1..3`, `smooth1..3`; bilinear; (p2, p3, p4, p5) with p5 not smoothed."""

    mode = "bilinear"

    def __init__(self, block: Any, layers: list[int], width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        inplanes = width
        for stage, blocks in enumerate(layers):
            parts = []
            for index in range(blocks):
                parts.append(block(inplanes, width * 2**stage, 2 if stage and not index else 1))
                inplanes = 4 * width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*parts))
        self.toplayer = nn.Conv2d(32 * width, OUT, 1)
        for index, channels in enumerate((16 * width, 8 * width, 4 * width), start=1):
            self.add_module(f"latlayer{index}", nn.Conv2d(channels, OUT, 1))
            self.add_module(f"smooth{index}", nn.Conv2d(OUT, OUT, 3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        c1 = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        c2 = self.layer1(c1)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        p5 = self.toplayer(self.layer4(c4))
        p4 = self._upsample_add(p5, self.latlayer1(c4))
        p3 = self._upsample_add(p4, self.latlayer2(c3))
        p2 = self._upsample_add(p3, self.latlayer3(c2))
        p4 = self.smooth1(p4)
        p3 = self.smooth2(p3)
        p2 = self.smooth3(p2)
        return p2, p3, p4, p5

    def _upsample_add(self, top: Tensor, lateral: Tensor) -> Tensor:
        align = False if self.mode == "bilinear" else None
        return F.interpolate(top, size=lateral.shape[2:], mode=self.mode, align_corners=align) + lateral


def single_file_fpn(layers: list[int], width: int) -> NamedLayersFPN:
    return NamedLayersFPN(_SingleFileBottleneck, layers, width)


def kuangliu_fpn101(width: int) -> NamedLayersFPN:
    return NamedLayersFPN(_KuangliuBottleneck, [2, 2, 2, 2], width)


class _ConstantNorm(nn.Module):
    """Detectron2's FrozenBatchNorm2d: four buffers and `F.batch_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=1e-5)


def _normed(cin: int, cout: int, kernel: int, stride: int) -> nn.Module:
    return detectron2_twin.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False, norm=_ConstantNorm(cout))


class _Detectron2Block(nn.Module):
    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.shortcut = _normed(cin, out, 1, stride) if cin != out else None
        self.conv1 = _normed(cin, width, 1, stride)  # STRIDE_IN_1X1, as its ImageNet weights require
        self.conv2, self.conv3 = _normed(width, width, 3, 1), _normed(width, out, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class _Detectron2ResNet(nn.Module):
    def __init__(self, layers: list[int], width: int) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": _normed(3, width, 7, 2)})
        cin = width
        for stage, blocks in enumerate(layers):
            parts = []
            for index in range(blocks):
                parts.append(_Detectron2Block(cin, width * 2**stage, 2 if stage and not index else 1))
                cin = 4 * width * 2**stage
            self.add_module(f"res{stage + 2}", nn.Sequential(*parts))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = F.max_pool2d(F.relu(self.stem["conv1"](x)), 3, 2, 1), {}
        for name in ("res2", "res3", "res4", "res5"):
            x = maps[name] = getattr(self, name)(x)
        return maps


def detectron2_fpn(
    layers: list[int], width: int, *, norm: Any = None, fuse_type: str = "sum", retina: bool = False
) -> nn.Module:
    """Image in, `p2..p6` out by name; or, as in its RetinaNet, `p3..p7` with P6 and P7 from res5."""
    levels = range(3 if retina else 2, 6)
    top = detectron2_twin.LastLevelP6P7(32 * width, OUT) if retina else detectron2_twin.LastLevelMaxPool()
    names, channels = [f"res{n}" for n in levels], [width * 2**n for n in levels]
    return detectron2_twin.FPN(_Detectron2ResNet(layers, width), names, channels, OUT, norm, top, fuse_type)


_PYRAMID = [(r"^toplayer\.", "fpn.inner_blocks.3.0."), (r"^smooth1\.", "fpn.layer_blocks.2.0.")]
_PYRAMID += [(rf"^latlayer{i}\.", f"fpn.inner_blocks.{3 - i}.0.") for i in (1, 2, 3)]
_PYRAMID += [(rf"^smooth{i}\.", f"fpn.layer_blocks.{3 - i}.0.") for i in (2, 3)]
_PYRAMID += [(r"^(conv1|bn1|layer\d)\.", r"body.\1.")]

SINGLE_FILE_NAMES = _PYRAMID + [
    (rf"\.bottleneck\.{index}\.", f".{name}.")
    for index, name in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"), (6, "conv3"), (7, "bn3"))
]
KUANGLIU_NAMES = [*_PYRAMID, (r"\.shortcut\.", ".downsample.")]


def detectron2_names(first: int) -> list[tuple[str, str]]:
    names = [(r"^bottom_up\.stem\.", "body."), (r"^top_block\.", "fpn.extra_blocks.")]
    names += [(rf"^bottom_up\.res{stage}\.", f"body.layer{stage - 1}.") for stage in range(2, 6)]
    for ours, theirs in (("inner", "lateral"), ("layer", "output")):
        for level in range(first, 6):
            prefix = rf"^fpn_{theirs}{level}\."
            names += [(prefix + r"norm\.", f"fpn.{ours}_blocks.{level - first}.1.")]
            names += [(prefix, f"fpn.{ours}_blocks.{level - first}.0.")]
    names += [(r"\.shortcut\.norm\.", ".downsample.1."), (r"\.shortcut\.", ".downsample.0.")]
    return [*names, (r"conv(\d)\.norm\.", r"bn\1.")]


def translated(state: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """A checkpoint under our names."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result
