"""The modules: the pyramid, its extra levels, a ResNet with a pyramid, and the merge of a BiFPN."""

from fpn_kernels.modules.batch_norm import FrozenBatchNorm2d
from fpn_kernels.modules.extra_blocks import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from fpn_kernels.modules.feature_pyramid import FeaturePyramidNetwork
from fpn_kernels.modules.resnet_fpn import ResNetFPN, resnet50_fpn, resnet101_fpn
from fpn_kernels.modules.weighted_merge import WeightedMerge

__all__ = [
    "ExtraFPNBlock",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ResNetFPN",
    "WeightedMerge",
    "resnet50_fpn",
    "resnet101_fpn",
]
