"""Models that users bring along: their pyramids computed by the fused calls, their weights converted."""

from fpn_kernels.interop.fuse import FusionReport, fuse, unfuse
from fpn_kernels.interop.state_dicts import convert_state_dict

__all__ = ["FusionReport", "convert_state_dict", "fuse", "unfuse"]
