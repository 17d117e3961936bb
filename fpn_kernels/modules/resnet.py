"""The bottom-up pathway: a bottleneck ResNet with torchvision's names that returns C2..C5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

_EXPANSION = 4
_CLASSIFIER = ("fc.weight", "fc.bias")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (arXiv 1512.03385, figure 5, right).

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolution; the output has four times as many.
        stride: of the block, 1 or 2.
        norm_layer: makes the norm of a number of channels.
        stride_in_1x1: put the stride into the first 1x1 convolution (the paper, Detectron2) instead of the 3x3
            (torchvision).
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm_layer: NormLayer, stride_in_1x1: bool) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        stride1, stride3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride3, padding=1, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), norm_layer(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A bottleneck ResNet without its classifier.

    The keys are torchvision's, so its published weights load in one line.  The classifier's ``fc.weight`` and
    ``fc.bias`` are ignored, and every other key must match::

        model.body.load_state_dict(torch.load("resnet50.pth", weights_only=True))

    Args:
        layers: blocks per stage; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101.
        width: channels of the stem; stage s returns ``width * 4 * 2**s``.
        norm_layer: makes the norm of a number of channels.
        stride_in_1x1: see `Bottleneck`.
        freeze_at: as in Detectron2: 0 trains everything, 1 freezes the stem, 2 the first stage too, up to 5.  Frozen
            parameters require no gradient, and frozen norms stay in eval mode.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        width: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.freeze_at = freeze_at
        self.out_channels = tuple(width * _EXPANSION * 2**stage for stage in range(4))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = width
        for stage, blocks in enumerate(layers):
            modules = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                modules.append(Bottleneck(in_channels, width * 2**stage, stride, norm_layer, stride_in_1x1))
                in_channels = self.out_channels[stage]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*modules))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[N, 3, H, W]`` to C2..C5: ``[N, 4 width 2**s, ceil(H / 2**(s + 2)), ceil(W / 2**(s + 2))]``."""
        c1 = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        c2 = self.layer1(c1)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c2, c3, c4, self.layer4(c4)

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        # In training mode, a frozen stage would still update its running statistics.
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        parts = [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        return [module for part in parts[: self.freeze_at] for module in part]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        for name in _CLASSIFIER:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
