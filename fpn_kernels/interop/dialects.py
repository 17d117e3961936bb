"""All dialects, and the search for feature pyramids in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from fpn_kernels.interop.detectron2 import Detectron2Dialect
from fpn_kernels.interop.dialect import Dialect
from fpn_kernels.interop.effdet import EffdetDialect
from fpn_kernels.interop.mmdet import MMDetectionDialect
from fpn_kernels.interop.named_layers import NamedLayersDialect
from fpn_kernels.interop.sam2 import Sam2Dialect
from fpn_kernels.interop.smp import SmpDialect
from fpn_kernels.interop.swapping import FusedForward, is_fused
from fpn_kernels.interop.torchvision import TorchvisionDialect
from fpn_kernels.interop.trial import TrialFailedError, same_forward
from fpn_kernels.modules.alterations import called_methods, defining_class, is_original_method
from fpn_kernels.modules.feature_pyramid import FeaturePyramidNetwork

# In the order of the search.
DIALECTS: tuple[Dialect, ...] = (
    TorchvisionDialect(),
    Detectron2Dialect(),
    MMDetectionDialect(),
    NamedLayersDialect(),
    Sam2Dialect(),
    SmpDialect(),
    EffdetDialect(),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A pyramid in a model.

    Attributes:
        path: its name in the model ("" for the model itself).
        module: the module.
        dialect: the name of its dialect.
        forward: the fused forward for it, or None.
        left: why it stays as it is, or None.
        refused: the option that is not supported, or None.
        served: whether it computes by the fused calls already.
    """

    path: str
    module: nn.Module
    dialect: str
    forward: type[FusedForward] | None = None
    left: str | None = None
    refused: str | None = None
    served: bool = False


def find(model: nn.Module) -> Iterator[Found]:
    """Yield each pyramid in `model` once, in the order of `nn.Module.named_modules`."""
    for path, module in model.named_modules():
        if isinstance(module, FeaturePyramidNetwork):
            yield Found(path, module, "fpn_kernels", left="computes by the fused calls already", served=True)
        elif is_fused(module):
            name = next(dialect.name for dialect in DIALECTS if isinstance(module, dialect.forwards))
            yield Found(path, module, name, left="is fused already", served=True)
        elif isinstance(module, torch.jit.ScriptModule):
            name = module.original_name
            if any(name in (dialect.class_names or ()) for dialect in DIALECTS):
                yield Found(path, module, name, left="was compiled by torch.jit.script, which fixes its forward")
        elif type(module).__getattr__ is nn.Module.__getattr__:  # not a wrapper, which passes attributes on
            for dialect in DIALECTS:
                found = _examine(path, module, dialect)
                if found is not None:
                    yield found
                    break


def _examine(path: str, module: nn.Module, dialect: Dialect) -> Found | None:
    """The module as a pyramid of this dialect; None if it is of another."""
    names = {cls.__name__ for cls in type(module).__mro__}
    if (dialect.class_names is not None and names.isdisjoint(dialect.class_names)) or not dialect.fits(module):
        return None
    left = _alteration(module, dialect)
    refused = dialect.refusal(module) if left is None else None
    if left is None and refused is None:
        left = dialect.nothing_to_do(module)
    forward, left = _choose(module, dialect) if left is None and refused is None else (None, left)
    return Found(path, module, dialect.name, forward, left, refused)


def _alteration(module: nn.Module, dialect: Dialect) -> str | None:
    """The method of the module's call that does not come from the class that defines its forward; or None."""
    owner = defining_class(type(module))
    if dialect.class_names is not None and owner.__name__ not in dialect.class_names:
        return f"{owner.__name__} has a forward of its own"
    for name, method in called_methods(type(module)).items():
        if name in module.__dict__:
            return f"a {name} of its own was put on the instance"
        if method is not getattr(owner, name, None):
            cls = defining_class(type(module), name)
            return f"{cls.__name__} has a {name} of its own, which the forward of {owner.__name__} calls"
        known = (
            hasattr(method, "__wrapped__") and getattr(method, "__globals__", {}).get("__name__") in dialect.decorators
        )
        if not known and not is_original_method(owner, name):
            return f"the {name} of {owner.__name__} was decorated or replaced"
    return None


def _choose(module: nn.Module, dialect: Dialect) -> tuple[type[FusedForward] | None, str | None]:
    """The fused forward that reproduces the module's results, or why there is none."""
    try:
        chosen = same_forward(module, dialect)
    except TrialFailedError as error:
        if defining_class(type(module)).__module__.partition(".")[0] in dialect.packages:
            return dialect.forwards[0], None
        return None, f"is not {dialect.name} itself, and could not be tried on a random input: {error}"
    if isinstance(chosen, str):
        return None, f"computes something else than {dialect.name} ({chosen})"
    return chosen, None
