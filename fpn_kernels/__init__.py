"""Fused kernels for Feature Pyramid Networks, as torch operators with autograd."""

from fpn_kernels import reference
from fpn_kernels.backends.selection import available_backends, use_backend
from fpn_kernels.diagnostics import explain
from fpn_kernels.functional import lateral_connection, output_conv, top_down_pathway, upsample_add
from fpn_kernels.modules import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    FrozenBatchNorm2d,
    LastLevelMaxPool,
    LastLevelP6P7,
    ResNetFPN,
    resnet50_fpn,
    resnet101_fpn,
)
from fpn_kernels.operators.decompositions import decompositions
from fpn_kernels.roi import assign_levels
from fpn_kernels.version import __version__

__all__ = [
    "ExtraFPNBlock",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ResNetFPN",
    "__version__",
    "assign_levels",
    "available_backends",
    "decompositions",
    "explain",
    "lateral_connection",
    "output_conv",
    "reference",
    "resnet50_fpn",
    "resnet101_fpn",
    "top_down_pathway",
    "upsample_add",
    "use_backend",
]
