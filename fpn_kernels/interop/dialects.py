"""All dialects, in the order in which a module is asked."""

from __future__ import annotations

from fpn_kernels.interop.detectron2 import Detectron2Dialect
from fpn_kernels.interop.dialect import Dialect
from fpn_kernels.interop.effdet import EffdetDialect
from fpn_kernels.interop.mmdet import MMDetectionDialect
from fpn_kernels.interop.named_layers import NamedLayersDialect
from fpn_kernels.interop.sam2 import Sam2Dialect
from fpn_kernels.interop.smp import SmpDialect
from fpn_kernels.interop.torchvision import TorchvisionDialect

DIALECTS: tuple[Dialect, ...] = (
    TorchvisionDialect(),
    Detectron2Dialect(),
    MMDetectionDialect(),
    NamedLayersDialect(),
    Sam2Dialect(),
    SmpDialect(),
    EffdetDialect(),
)
