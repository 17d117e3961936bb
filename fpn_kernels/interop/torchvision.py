"""torchvision's `FeaturePyramidNetwork`, alone or inside its detectors (Faster, Mask and Keypoint R-CNN, RetinaNet,
FCOS): nearest resize to the size of the lateral map, extra blocks as they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fpn_kernels.interop.blocks import block_parameters
from fpn_kernels.interop.dialect import Dialect, Random, has_attributes, in_channels
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import pyramid


class TorchvisionForward(FusedForward):
    """Maps in by name, finest first; the pyramid out by name."""

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
    forwards = (TorchvisionForward,)

    def fits(self, module: nn.Module) -> bool:
        return (
            has_attributes(module, "extra_blocks")
            and isinstance(getattr(module, "inner_blocks", None), nn.ModuleList)
            and isinstance(getattr(module, "layer_blocks", None), nn.ModuleList)
            and len(module.inner_blocks) == len(module.layer_blocks) > 0  # type: ignore[arg-type]
        )

    def example(self, module: nn.Module, random: Random) -> tuple[Any, ...]:
        channels = [in_channels(block) for block in module.inner_blocks]  # type: ignore[union-attr,operator]
        maps = random.pyramid(channels, exact=False)
        return (OrderedDict((str(level), feature) for level, feature in enumerate(maps)),)
