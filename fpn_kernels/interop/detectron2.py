"""Detectron2's `FPN`: image in, maps out by name; enlarging by 2, so that other sizes are the error they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fpn_kernels.interop.blocks import block_parameters
from fpn_kernels.interop.dialect import Dialect, Random, has_attributes, in_channels
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import GAINS, pyramid


class Detectron2Forward(FusedForward):
    """Runs `bottom_up` on the image and builds the pyramid on its maps.

    The blocks are read from the lists that the class itself reads (coarsest first), not from the submodules
    ``fpn_lateral{n}``: a module assigned over one of those is no part of the computation there either.
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
    """Stands in for a backbone: the same maps whatever the image."""

    def __init__(self, maps: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.maps = dict(maps)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: feature * x.mean() for name, feature in self.maps.items()}


class Detectron2Dialect(Dialect):
    name = "Detectron2 FPN"
    packages = ("detectron2",)
    class_names = ("FPN",)
    forwards = (Detectron2Forward,)

    def fits(self, module: nn.Module) -> bool:
        return (
            has_attributes(module, "in_features", "top_block", "_fuse_type", "_out_features")
            and isinstance(getattr(module, "bottom_up", None), nn.Module)
            and isinstance(getattr(module, "lateral_convs", None), list)
            and isinstance(getattr(module, "output_convs", None), list)
            and len(module.lateral_convs) == len(module.output_convs) == len(module.in_features) > 0  # type: ignore[arg-type]
        )

    def refusal(self, module: nn.Module) -> str | None:
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

    def example(self, module: nn.Module, random: Random) -> tuple[Any, ...]:
        return (random.positive(2, 3, 8, 8),)
