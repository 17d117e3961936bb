"""Which modules of a model are feature pyramids, and what is to become of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from fpn_kernels.interop.dialect import Dialect
from fpn_kernels.interop.dialects import DIALECTS
from fpn_kernels.interop.swapping import FusedForward, is_fused
from fpn_kernels.interop.trial import TrialFailedError, same_forward
from fpn_kernels.modules.alterations import called_methods, defining_class, is_own_method
from fpn_kernels.modules.feature_pyramid import FeaturePyramidNetwork


@dataclasses.dataclass(frozen=True)
class Found:
    """A pyramid in a model.

    Attributes:
        path: its name in the model ("" for the model itself).
        module: the module.
        dialect: the name of what it speaks.
        forward: the fused forward it can have, or None.
        left: why it is left as it is, or None.
        refused: which of its options cannot be served, or None.
        served: whether it computes by the fused calls as it is.
    """

    path: str
    module: nn.Module
    dialect: str
    forward: type[FusedForward] | None = None
    left: str | None = None
    refused: str | None = None
    served: bool = False


def find(model: nn.Module) -> Iterator[Found]:
    """Every pyramid in `model`, each once, in the order of `nn.Module.named_modules`."""
    for path, module in model.named_modules():
        if isinstance(module, FeaturePyramidNetwork):
            yield Found(path, module, "fpn_kernels", left="computes by the fused calls already", served=True)
        elif is_fused(module):
            yield Found(path, module, _name_of_fused(module), left="is fused already", served=True)
        elif isinstance(module, torch.jit.ScriptModule):
            name = module.original_name
            if any(name in (dialect.class_names or ()) for dialect in DIALECTS):
                yield Found(path, module, name, left="was compiled by torch.jit.script, which fixes its forward")
        elif type(module).__getattr__ is nn.Module.__getattr__:
            # Else it passes on the attributes of what it wraps, whose own module comes later.
            for dialect in DIALECTS:
                found = _ask(path, module, dialect)
                if found is not None:
                    yield found
                    break


def _name_of_fused(module: nn.Module) -> str:
    return next(dialect.name for dialect in DIALECTS if isinstance(module, dialect.forwards))


def _ask(path: str, module: nn.Module, dialect: Dialect) -> Found | None:
    names = [cls.__name__ for cls in type(module).__mro__]
    if dialect.class_names is not None and not set(names) & set(dialect.class_names):
        return None
    if not dialect.fits(module):
        return None
    owner = defining_class(type(module))
    if dialect.class_names is not None and owner.__name__ not in dialect.class_names:
        return Found(path, module, dialect.name, left=f"{owner.__name__} has a forward of its own")
    altered = _altered_method(module, owner, dialect)
    if altered is not None:
        return Found(path, module, dialect.name, left=altered)
    refused = dialect.refusal(module)
    if refused is not None:
        return Found(path, module, dialect.name, refused=refused)
    reason = dialect.nothing_to_do(module)
    if reason is not None:
        return Found(path, module, dialect.name, left=reason)
    try:
        chosen = same_forward(module, dialect)
    except TrialFailedError as error:
        if owner.__module__.partition(".")[0] not in dialect.packages:
            reason = f"is not {dialect.name} itself, and could not be tried on a random input: {error}"
            return Found(path, module, dialect.name, left=reason)
        chosen = dialect.forwards[0]
    if isinstance(chosen, str):
        return Found(path, module, dialect.name, left=f"computes something else than {dialect.name} ({chosen})")
    return Found(path, module, dialect.name, chosen)


def _altered_method(module: nn.Module, owner: type, dialect: Dialect) -> str | None:
    """Which method that a call runs is not that of the class that defines its forward; or None."""
    for name, method in called_methods(type(module)).items():
        if name in module.__dict__:
            return f"a {name} of its own was put on the instance"
        if method is not getattr(owner, name, None):
            cls = defining_class(type(module), name)
            return f"{cls.__name__} has a {name} of its own, which the forward of {owner.__name__} calls"
        known = (
            hasattr(method, "__wrapped__") and getattr(method, "__globals__", {}).get("__name__") in dialect.decorators
        )
        if not known and not is_own_method(owner, name):
            return f"the {name} of {owner.__name__} was decorated or replaced"
    return None
