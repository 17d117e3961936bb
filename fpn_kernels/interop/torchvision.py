"""torchvision's `FeaturePyramidNetwork`, alone or in a detector (Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters, in_channels
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import pyramid


class TorchvisionForward(FusedForward):
    """Maps by name to maps by name, finest first; each is resized (nearest) to the next finer one."""

    inner_blocks: nn.ModuleList
    layer_blocks: nn.ModuleList
    extra_blocks: nn.Module | None

    def forward(self, x: Mapping[str, Tensor]) -> Any:
        names, features = list(x.keys()), list(x.values())
        if len(features) != len(self.inner_blocks):
            return super().forward(x)  # type: ignore[misc]
        _, results = pyramid(
            features, list(self.inner_blocks), list(self.layer_blocks), find_parameters=block_parameters
        )
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, features, names)
        return OrderedDict(zip(names, results, strict=False))


class TorchvisionDialect(Dialect):
    name = "torchvision FeaturePyramidNetwork"
    packages = ("torchvision",)
    class_names = ("FeaturePyramidNetwork",)
    parts = ((nn.ModuleList, ("inner_blocks", "layer_blocks")),)
    options = ("extra_blocks",)
    forwards = (TorchvisionForward,)

    def fits(self, module: Any) -> bool:
        return super().fits(module) and len(module.inner_blocks) == len(module.layer_blocks) > 0

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        maps = random.pyramid(list(map(in_channels, module.inner_blocks)), exact=False)
        return (OrderedDict((str(level), feature) for level, feature in enumerate(maps)),)
