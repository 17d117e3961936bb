"""Fused kernels for Feature Pyramid Networks, as torch operators with autograd."""

# The first of all: it asks for the torch that the rest needs.
from fpn_kernels import compatibility as compatibility  # isort: split

from fpn_kernels import reference
from fpn_kernels.diagnostics import explain
from fpn_kernels.functional import lateral_connection, output_conv, top_down_pathway, upsample_add, weighted_merge
from fpn_kernels.interop import convert_state_dict, fuse, unfuse
from fpn_kernels.modules import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    FrozenBatchNorm2d,
    LastLevelMaxPool,
    LastLevelP6P7,
    ResNetFPN,
    WeightedMerge,
    resnet50_fpn,
    resnet101_fpn,
)
from fpn_kernels.operators.decompositions import decompositions
from fpn_kernels.operators.dispatch import available_backends, use_backend
from fpn_kernels.roi import assign_levels
from fpn_kernels.version import __version__

__all__ = [
    "ExtraFPNBlock",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ResNetFPN",
    "WeightedMerge",
    "__version__",
    "assign_levels",
    "available_backends",
    "convert_state_dict",
    "decompositions",
    "explain",
    "fuse",
    "lateral_connection",
    "output_conv",
    "reference",
    "resnet50_fpn",
    "resnet101_fpn",
    "top_down_pathway",
    "unfuse",
    "upsample_add",
    "use_backend",
    "weighted_merge",
]
