"""`fuse` and `unfuse`: switch the feature pyramids of a model to the fused calls, and back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

from torch import nn

from fpn_kernels.interop.dialects import DIALECTS, Found, find
from fpn_kernels.interop.swapping import is_fused, original_class, restore, swap, was_rewrapped
from fpn_kernels.interop.verification import Call, difference, record_calls, training_difference

_LOGGER = logging.getLogger("fpn_kernels")

_Model = TypeVar("_Model", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """The pyramids that `fuse` found.

    Attributes:
        fused: the path of each fused module, with its dialect.
        left: the path of each module that stayed as it was, with the reason.
    """

    fused: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        states = {path: f"fused ({dialect})" for path, dialect in self.fused.items()}
        states |= {path: f"left, {reason}" for path, reason in self.left.items()}
        lines = [f"{path or '(the model itself)'}: {state}" for path, state in states.items()]
        return "\n".join(lines) or "no feature pyramid network"


@overload
def fuse(model: _Model, *, verify: Any = None, report: Literal[False] = False) -> _Model: ...


@overload
def fuse(model: _Model, *, verify: Any = None, report: Literal[True]) -> tuple[_Model, FusionReport]: ...


def fuse(model: _Model, *, verify: Any = None, report: bool = False) -> _Model | tuple[_Model, FusionReport]:
    """Switches every feature pyramid in a model to the fused calls, in place.

    Supported are torchvision's `FeaturePyramidNetwork` (as in its detectors), Detectron2's `FPN`, MMDetection's `FPN`,
    the single-file networks with `toplayer`, `latlayer{i}` and `smooth{i}` (kuangliu/pytorch-fpn and the common ResNet
    FPN), SAM 2's `FpnNeck`, the merges of segmentation_models_pytorch's FPN decoder and EfficientDet-style nodes with a
    plain sum.  None of these packages is imported.

    Only the computation changes.  A fused module keeps its parameters, keys, hooks, name, mode and device, and its
    class becomes a subclass of its own class.  So `isinstance`, optimisers, checkpoints, `DistributedDataParallel`,
    `copy.deepcopy`, `pickle` and `torch.save` work as before; only reading a pickled fused model requires this library
    (see `unfuse`).  Under autocast the fused calls run in the autocast dtype with float32 accumulators.  Fuse a model
    before `fully_shard`.

    Blocks with hooks, a parametrisation, a patch, a wrapper or a replacement (LoRA, quantised) are called as modules,
    as often and in the same order as before.  A fused pyramid runs the forward of its own class under a functorch
    transform, forward-mode AD, a TorchScript tracer or symbolic tracing, with a global module hook, where
    `torch.nn.functional.conv2d`, `interpolate` or `batch_norm` was replaced, and where that forward or a method that it
    calls was replaced after fusing.

    Before any change, a copy of each pyramid with random weights runs on a small input on the CPU, both ways, in eval
    mode and in training.  A pyramid stays as it is if the results or the order of its block calls differ (a fork,
    another version, a subclass), if its forward was decorated or patched, or if it overrides a method that the forward
    calls.  No random generator, forced backend or mode of another thread changes.

    Args:
        model: any module; also a pyramid itself.
        verify: an example input; a tuple is the positional arguments, so wrap an input that is a tuple in another.  The
            model runs before and after in eval mode, and the results of each pyramid are compared within the tolerance
            of their dtype.  Then fused and original copies of each pyramid train for three steps on the maps of its
            first call, and their results, gradients and buffers are compared.  If a pyramid cannot be copied or
            trained, the logger says so.
        report: also return the `FusionReport`, with the fused modules, the others and the reasons.  The logger
            "fpn_kernels" receives the same.

    Returns:
        `model`; with `report`, ``(model, FusionReport)``.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model holds no pyramid that can be fused, or one with an unsupported option (the message names
            the module and the option); nothing is changed then.  To skip such a module, fuse submodules one by one.
        RuntimeError: `verify` found a difference (the message names the module, the level and the error); the model is
            restored.

    Cost:
        Moves no bytes of the model.  The copy for the trial takes 4 bytes per parameter of one pyramid at a time, on
        the CPU.  `verify` runs the model twice and each pyramid nine times forward and backward.  It keeps a copy of
        the arguments and results per call and step, and one copy of one pyramid at a time with its gradients.

    Source:
        The classes named above, as their libraries publish them; one file per library in `fpn_kernels.interop`.  The
        fused calls are `fpn_kernels.top_down_pathway` and `fpn_kernels.output_conv`.

    Example:
        ```python
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        fpn_kernels.fuse(model)
        ```
    """
    _require_module(model)
    found = list(find(model))
    _require_supported(model, found)
    chosen = [(each, each.forward) for each in found if each.forward is not None]
    pyramids = {each.path: each.module for each, _ in chosen}
    expected = record_calls(model, pyramids, verify) if verify is not None else {}
    try:
        for each, forward in chosen:
            swap(each.module, forward)
        if verify is not None:
            different = difference(pyramids, record_calls(model, pyramids, verify), expected)
            different = different or _training_difference(pyramids, expected)
            if different is not None:
                raise RuntimeError(f"verify: {different}; the model is restored")
    except BaseException:
        for module in pyramids.values():
            if is_fused(module):
                restore(module)
        raise
    result = FusionReport(
        {each.path: each.dialect for each, _ in chosen}, {each.path: each.left for each in found if each.left}
    )
    for line in str(result).splitlines():
        _LOGGER.info("fuse: %s", line)
    return (model, result) if report else model


def unfuse(model: _Model) -> _Model:
    """Restores the forward of every module that `fuse` changed, in place.

    Required before `torch.jit.script`, and before pickling a whole model for a reader without this library.  A
    `state_dict` is the same with and without.

    Args:
        model: any module, fused or not.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a wrapper (e.g. FSDP) has changed the class of a fused module since; nothing is changed then.

    Cost:
        Moves no bytes: the class of each module is set back.
    """
    _require_module(model)
    fused = [(path, module) for path, module in model.named_modules() if is_fused(module)]
    for path, module in fused:
        if was_rewrapped(module):
            raise ValueError(
                f"model: the class of {path or 'the model itself'} was changed to {type(module)} after fusing;"
                " undo that first"
            )
    for _, module in fused:
        restore(module)
    return model


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _training_difference(pyramids: Mapping[str, nn.Module], calls: Mapping[str, list[Call]]) -> str | None:
    for path, module in pyramids.items():
        name = path or "the model itself"
        try:
            found = training_difference(module, original_class(module), calls[path][0])
        except Exception as error:
            _LOGGER.warning("fuse: verify: %s: training was not compared, %s: %s", name, type(error).__name__, error)
            continue
        if found is not None:
            return f"{name}: {found}"
    return None


def _require_supported(model: nn.Module, found: list[Found]) -> None:
    for each in found:
        if each.refused is not None:
            raise ValueError(f"model: {each.path or 'the model itself'} ({each.dialect}) has {each.refused}")
    if any(each.forward is not None or each.served for each in found):
        return
    left = "".join(f"; {each.path or 'the model itself'} ({each.dialect}): {each.left}" for each in found)
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise ValueError(f"model: no feature pyramid to fuse in {type(model).__name__} (known: {known}){left}")
