"""Fused kernels for Feature Pyramid Networks, as torch operators with autograd."""

# First: it checks that torch is new enough for the rest.
from fpn_kernels import compatibility as compatibility  # isort: split

from fpn_kernels import functional, reference
from fpn_kernels.diagnostics import explain
from fpn_kernels.functional import *  # noqa: F403 - the functions in its `__all__`
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
    *functional.__all__,
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
    "reference",
    "resnet50_fpn",
    "resnet101_fpn",
    "unfuse",
    "use_backend",
]
