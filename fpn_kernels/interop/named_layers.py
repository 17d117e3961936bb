"""Single-file networks whose pyramid is `toplayer`, `latlayer{i}` and `smooth{i}` (i from the coarse end).

These are kuangliu/pytorch-fpn and the common ResNet FPN.  The names identify them; P5 is not smoothed.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import Order, in_layout_of, pyramid

_COARSEST_FIRST = Order(laterals_first=False, outputs="coarsest first")
_FINEST_FIRST = Order(laterals_first=False, outputs="finest first")


class _NamedLayersForward(FusedForward):
    """Image to (p2, p3, p4, p5); the stem is the ResNet's (convolution, norm, ReLU, 3x3 max-pool)."""

    _mode: str
    _order: Order

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        modules: Any = self
        x = modules.bn1(modules.conv1(x))
        x = modules.relu(x) if isinstance(getattr(self, "relu", None), nn.Module) else F.relu(x)
        x = modules.maxpool(x) if isinstance(getattr(self, "maxpool", None), nn.Module) else F.max_pool2d(x, 3, 2, 1)
        features = []
        for layer in (modules.layer1, modules.layer2, modules.layer3, modules.layer4):
            x = layer(x)
            features.append(x)
        merged, outputs = pyramid(
            features,
            [modules.latlayer3, modules.latlayer2, modules.latlayer1, modules.toplayer],
            [modules.smooth3, modules.smooth2, modules.smooth1],
            order=self._order,
            mode=self._mode,
            find_parameters=block_parameters,
        )
        return (*outputs, in_layout_of(features[-1], merged[-1]))


def _variant(name: str, mode: str, order: Order) -> type[FusedForward]:
    return type(name, (_NamedLayersForward,), {"__module__": __name__, "_mode": mode, "_order": order})


# The published resize is bilinear, the paper's nearest.  "Returned" networks call the smooth layers in the order of the
# results.  A pickled model refers to these names.
BilinearNamedLayersForward = _variant("BilinearNamedLayersForward", "bilinear", _COARSEST_FIRST)
BilinearReturnedNamedLayersForward = _variant("BilinearReturnedNamedLayersForward", "bilinear", _FINEST_FIRST)
NearestNamedLayersForward = _variant("NearestNamedLayersForward", "nearest", _COARSEST_FIRST)
NearestReturnedNamedLayersForward = _variant("NearestReturnedNamedLayersForward", "nearest", _FINEST_FIRST)
NearestExactNamedLayersForward = _variant("NearestExactNamedLayersForward", "nearest-exact", _COARSEST_FIRST)
NearestExactReturnedNamedLayersForward = _variant(
    "NearestExactReturnedNamedLayersForward", "nearest-exact", _FINEST_FIRST
)


class NamedLayersDialect(Dialect):
    name = "single-file FPN (toplayer, latlayer, smooth)"
    parts = (
        (nn.Module, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "toplayer")),
        (nn.Module, ("latlayer1", "latlayer2", "latlayer3", "smooth1", "smooth2", "smooth3")),
    )
    forwards = (
        BilinearNamedLayersForward,
        BilinearReturnedNamedLayersForward,
        NearestNamedLayersForward,
        NearestReturnedNamedLayersForward,
        NearestExactNamedLayersForward,
        NearestExactReturnedNamedLayersForward,
    )

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        # Stages of 20 x 27, 10 x 14, 5 x 7 and 3 x 4: sizes at which the three resizes differ.
        return (random.normal(2, module.conv1.in_channels, 77, 107),)
