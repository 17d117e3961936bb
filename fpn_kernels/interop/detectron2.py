"""Detectron2's `FPN`, which enlarges by 2, so other sizes raise the same error as there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters, in_channels
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import GAINS, pyramid


class Detectron2Forward(FusedForward):
    """Image to maps by name: runs `bottom_up`, then the pyramid on its maps.

    The blocks come from the lists that the original class reads (coarsest first), not from its submodules
    ``fpn_lateral{n}``: a module assigned to one of these has no effect there either.
    """

    bottom_up: nn.Module
    in_features: Sequence[str]
    lateral_convs: Sequence[nn.Module]
    output_convs: Sequence[nn.Module]
    top_block: nn.Module | None
    _fuse_type: str
    _out_features: Sequence[str]

    def forward(self, x: Any) -> dict[str, Tensor]:
        bottom_up = self.bottom_up(x)
        _, results = pyramid(
            [bottom_up[name] for name in self.in_features],
            list(self.lateral_convs)[::-1],
            list(self.output_convs)[::-1],
            gain=GAINS[self._fuse_type],
            scale_factor=2,
            find_parameters=block_parameters,
        )
        if self.top_block is not None:
            name: Any = self.top_block.in_feature
            source = bottom_up[name] if name in bottom_up else results[self._out_features.index(name)]
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results, strict=True))


class _BottomUp(nn.Module):
    """Replaces a backbone by fixed maps, scaled by the mean of the image."""

    def __init__(self, maps: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.maps = dict(maps)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: feature * x.mean() for name, feature in self.maps.items()}


class Detectron2Dialect(Dialect):
    name = "Detectron2 FPN"
    packages = ("detectron2",)
    class_names = ("FPN",)
    parts = ((nn.Module, ("bottom_up",)), (list, ("lateral_convs", "output_convs")))
    options = ("in_features", "top_block", "_fuse_type", "_out_features")
    forwards = (Detectron2Forward,)

    def fits(self, module: Any) -> bool:
        return (
            super().fits(module)
            and len(module.lateral_convs) == len(module.output_convs) == len(module.in_features) > 0
        )

    def refusal(self, module: Any) -> str | None:
        if module._fuse_type not in GAINS:
            return f"fuse_type={module._fuse_type!r} is not one of 'sum', 'avg'"
        return None

    def stand_ins(self, module: Any, random: Random) -> Mapping[str, nn.Module]:
        channels = [in_channels(block) for block in reversed(module.lateral_convs)]
        maps = dict(zip(module.in_features, random.pyramid(channels, exact=True), strict=True))
        source = getattr(module.top_block, "in_feature", None)
        if source is not None and source not in maps and source not in module._out_features:
            maps[source] = random.normal(2, in_channels(module.top_block), 3, 5)
        return {"bottom_up": _BottomUp(maps)}

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        return (random.positive(2, 3, 8, 8),)
