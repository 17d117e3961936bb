"""SAM 2's `FpnNeck`: some levels merged, the coarser map enlarged by 2 in float32, no output convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters, in_channels, resize_refusal
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.fusing import is_autocast
from fpn_kernels.modules.pathway import GAINS, add_top, merge_level


class Sam2Forward(FusedForward):
    """Maps to (merged maps, positional encodings), all finest first.

    As in the original, a sum and its result are float32 even where the convolutions run in 16 bits.
    """

    convs: nn.ModuleList
    position_encoding: nn.Module
    fpn_interp_model: str
    fuse_type: str
    fpn_top_down_levels: Sequence[int]

    def forward(self, xs: Sequence[Tensor]) -> Any:
        if len(xs) != len(self.convs):
            return super().forward(xs)  # type: ignore[misc]
        maps: list[Tensor] = []
        encodings: list[Tensor] = []
        for level in reversed(range(len(xs))):
            top = maps[-1] if maps and level in self.fpn_top_down_levels else None
            merged = self._merge(self.convs[len(xs) - 1 - level], xs[level], top)
            maps.append(merged)
            encodings.append(self.position_encoding(merged).to(merged.dtype))
        return maps[::-1], encodings[::-1]

    def _merge(self, block: nn.Module, feature: Tensor, top: Tensor | None) -> Tensor:
        options: Any = {"mode": self.fpn_interp_model, "gain": GAINS[self.fuse_type], "scale_factor": 2}
        parameters = block_parameters(block, 1)
        wide = feature.dtype == torch.float32 and not is_autocast(feature)
        if top is None or (wide and top.dtype == torch.float32):
            return merge_level(feature, block, parameters, top, **options)
        lateral = merge_level(feature, block, parameters, None)
        dtype = torch.promote_types(lateral.dtype, torch.float32)
        with torch.autocast(feature.device.type, enabled=False):
            return add_top(lateral.to(dtype), top.float().to(dtype), **options)


class _Encoding(nn.Module):
    """Replaces a positional encoding."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Sam2Dialect(Dialect):
    name = "SAM 2 FpnNeck"
    packages = ("sam2",)
    class_names = ("FpnNeck",)
    parts = ((nn.ModuleList, ("convs",)), (nn.Module, ("position_encoding",)))
    options = ("fpn_interp_model", "fuse_type", "fpn_top_down_levels")
    forwards = (Sam2Forward,)

    def fits(self, module: Any) -> bool:
        return super().fits(module) and len(module.convs) > 0

    def refusal(self, module: Any) -> str | None:
        if module.fuse_type not in GAINS:
            return f"fuse_type={module.fuse_type!r} is not one of 'sum', 'avg'"
        return resize_refusal("fpn_interp_model", module.fpn_interp_model)

    def stand_ins(self, module: Any, random: Random) -> Mapping[str, nn.Module]:
        return {"position_encoding": _Encoding()}

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        return (random.pyramid(list(map(in_channels, module.convs))[::-1], exact=True),)
