"""The single-file networks whose pyramid is `toplayer`, `latlayer{i}` and `smooth{i}` (i from the coarse end):
kuangliu/pytorch-fpn and the common ResNet FPN.  Told by these names; P5 is not smoothed."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels.interop.blocks import block_parameters
from fpn_kernels.interop.dialect import Dialect, Random
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import Order, in_layout_of, pyramid

_STAGES = 4
_FINEST_FIRST = Order(laterals_first=False, outputs="finest first")


class _NamedLayersForward(FusedForward):
    """Image in, (p2, p3, p4, p5) out; the stem is the ResNet's (convolution, norm, ReLU, 3x3 max-pool)."""

    _mode: str
    _order = Order(laterals_first=False, outputs="coarsest first")
    conv1: nn.Module
    bn1: nn.Module
    toplayer: nn.Module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        modules: Any = self
        x = self.bn1(self.conv1(x))
        x = modules.relu(x) if isinstance(getattr(self, "relu", None), nn.Module) else F.relu(x)
        x = modules.maxpool(x) if isinstance(getattr(self, "maxpool", None), nn.Module) else F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage in range(1, _STAGES + 1):
            x = getattr(self, f"layer{stage}")(x)
            features.append(x)
        laterals = [getattr(self, f"latlayer{index}") for index in reversed(range(1, _STAGES))]
        smooth = [getattr(self, f"smooth{index}") for index in reversed(range(1, _STAGES))]
        merged, outputs = pyramid(
            features,
            [*laterals, self.toplayer],
            smooth,
            order=self._order,
            mode=self._mode,
            find_parameters=block_parameters,
        )
        return (*outputs, in_layout_of(features[-1], merged[-1]))


class BilinearNamedLayersForward(_NamedLayersForward):
    """With the bilinear resize of the published networks."""

    _mode = "bilinear"


class BilinearReturnedNamedLayersForward(BilinearNamedLayersForward):
    """Where the smooth layers are called in the order of the results, the finest first."""

    _order = _FINEST_FIRST


class NearestNamedLayersForward(_NamedLayersForward):
    """With the nearest resize of the paper."""

    _mode = "nearest"


class NearestReturnedNamedLayersForward(NearestNamedLayersForward):
    """Where the smooth layers are called in the order of the results, the finest first."""

    _order = _FINEST_FIRST


class NearestExactNamedLayersForward(_NamedLayersForward):
    """With the corrected nearest resize."""

    _mode = "nearest-exact"


class NearestExactReturnedNamedLayersForward(NearestExactNamedLayersForward):
    """Where the smooth layers are called in the order of the results, the finest first."""

    _order = _FINEST_FIRST


class NamedLayersDialect(Dialect):
    name = "single-file FPN (toplayer, latlayer, smooth)"
    forwards = (
        BilinearNamedLayersForward,
        BilinearReturnedNamedLayersForward,
        NearestNamedLayersForward,
        NearestReturnedNamedLayersForward,
        NearestExactNamedLayersForward,
        NearestExactReturnedNamedLayersForward,
    )

    def fits(self, module: nn.Module) -> bool:
        names = ["conv1", "bn1", "toplayer"]
        names += [f"layer{stage}" for stage in range(1, _STAGES + 1)]
        names += [f"{kind}{index}" for kind in ("latlayer", "smooth") for index in range(1, _STAGES)]
        return all(isinstance(module._modules.get(name), nn.Module) for name in names)

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        # Stages of 20 x 27, 10 x 14, 5 x 7, 3 x 4: the three resizes differ there.
        return (random.normal(2, module.conv1.in_channels, 77, 107),)
