"""Which modules of a model are feature pyramids, and what is to become of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from fpn_kernels.interop.blocks import defining_class
from fpn_kernels.interop.dialect import Dialect
from fpn_kernels.interop.dialects import DIALECTS
from fpn_kernels.interop.swapping import FusedForward, is_fused
from fpn_kernels.interop.trial import TrialFailedError, same_forward
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
        else:
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
    owner = defining_class(module)
    if dialect.class_names is not None and owner.__name__ not in dialect.class_names:
        return Found(path, module, dialect.name, left=f"{owner.__name__} has a forward of its own")
    if "forward" in module.__dict__:
        return Found(path, module, dialect.name, left="a forward of its own was put on the instance")
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
