"""segmentation_models_pytorch's `FPNBlock`: the merges p4, p3 and p2 of its FPN decoder, which enlarge by 2.

The segmentation heads after the pyramid are not fused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters, in_channels, out_channels, resize_refusal
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.pathway import merge_level


class SmpForward(FusedForward):
    """``skip_conv(skip)`` plus the enlarged coarser map, in one call."""

    skip_conv: nn.Module
    interpolation_mode: str

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        mode = getattr(self, "interpolation_mode", "nearest")
        parameters = block_parameters(self.skip_conv, 1)
        return merge_level(skip, self.skip_conv, parameters, x, mode=mode, scale_factor=2)


class SmpDialect(Dialect):
    name = "segmentation_models_pytorch FPNBlock"
    packages = ("segmentation_models_pytorch",)
    class_names = ("FPNBlock",)
    parts = ((nn.Module, ("skip_conv",)),)
    forwards = (SmpForward,)

    def refusal(self, module: Any) -> str | None:
        return resize_refusal("interpolation_mode", getattr(module, "interpolation_mode", "nearest"))

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        fine, coarse = random.pyramid([in_channels(module.skip_conv), out_channels(module.skip_conv)], exact=True)
        return coarse, fine
