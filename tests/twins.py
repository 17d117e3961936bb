"""Feature pyramids in plain PyTorch, as other libraries write them: what the modules are compared with.

Our own code, keyed and run like the published networks; nothing of them can be imported here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels.backends.selection import record_calls
from fpn_kernels.modules import FeaturePyramidNetwork

CHANNELS = [8, 12, 16, 20]
WIDTH = 12
SIZES = [(38, 57), (19, 29), (10, 15), (5, 8)]  # a 152 x 228 image at strides 4 to 32: odd sizes at each merge
NAMES = ["0", "1", "2", "3"]


class Twin(nn.Module):
    """The published algorithm in plain PyTorch, parameters made in torchvision's order."""

    def __init__(
        self,
        channels: list[int],
        width: int,
        extra_blocks: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        mode: str = "nearest",
        fuse_type: str = "sum",
    ) -> None:
        super().__init__()
        self.mode, self.fuse_type = mode, fuse_type
        self.inner_blocks, self.layer_blocks = nn.ModuleList(), nn.ModuleList()
        for cin in channels:
            for blocks, conv in (
                (self.inner_blocks, nn.Conv2d(cin, width, 1, bias=norm_layer is None)),
                (self.layer_blocks, nn.Conv2d(width, width, 3, padding=1, bias=norm_layer is None)),
            ):
                blocks.append(nn.Sequential(conv) if norm_layer is None else nn.Sequential(conv, norm_layer(width)))
        for conv in [m for m in self.modules() if isinstance(m, nn.Conv2d)]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.extra_blocks = extra_blocks

    def forward(self, x: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        names, features = list(x), list(x.values())
        merged = self.inner_blocks[-1](features[-1])
        results = [self.layer_blocks[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.inner_blocks[level](features[level])
            align = False if self.mode == "bilinear" else None
            merged = lateral + F.interpolate(merged, lateral.shape[2:], mode=self.mode, align_corners=align)
            if self.fuse_type == "avg":
                merged = merged / 2
            results.insert(0, self.layer_blocks[level](merged))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, features, names)
        return OrderedDict(zip(names, results, strict=True))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def scramble(module: nn.Module) -> None:
    """Values that a wrong fold cannot survive: no zero bias, no unit scale, no negative variance."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var") or ".1.weight" in name:
                value.uniform_(0.5, 2.0)
            elif name.endswith(("bias", "running_mean")):
                value.normal_()


def pair(
    norm_layer: Callable[[int], nn.Module] | None = None, *, device: str = "cpu", **options: Any
) -> tuple[FeaturePyramidNetwork, Twin]:
    """The network and its twin with the same scrambled weights, in eval mode."""
    network = FeaturePyramidNetwork(CHANNELS, WIDTH, None, norm_layer, **options)
    scramble(network)
    twin = Twin(CHANNELS, WIDTH, None, norm_layer, **options)
    twin.load_state_dict(network.state_dict(), strict=True)
    return network.to(device).eval(), twin.to(device).eval()


def maps(
    batch: int = 2,
    *,
    channels: list[int] = CHANNELS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> OrderedDict[str, Tensor]:
    return OrderedDict(
        (name, torch.randn(batch, c, *size, device=device, dtype=dtype, requires_grad=grad))
        for name, c, size in zip(NAMES, channels, SIZES, strict=True)
    )


def assert_same(actual: OrderedDict[str, Tensor], expected: OrderedDict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=2e-5 * float(value.detach().abs().max()))


def served(call: Callable[[], Any]) -> list[str]:
    """The operators of the pathway that a call runs through; `convolved` counts those of the outputs."""
    with record_calls() as calls:
        call()
    return [operator for operator, _ in calls if operator not in ("output_conv", "reorder")]


def convolved(call: Callable[[], Any]) -> int:
    """How many output convolutions a call hands to the library."""
    with record_calls() as calls:
        call()
    return [operator for operator, _ in calls].count("output_conv")
