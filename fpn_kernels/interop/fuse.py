"""`fuse` and `unfuse`: the pyramids of any model, computed by the fused calls, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, overload

from torch import nn

from fpn_kernels.interop.dialects import DIALECTS
from fpn_kernels.interop.finding import Found, find
from fpn_kernels.interop.swapping import is_fused, original_class, restore, swap, was_rewrapped
from fpn_kernels.interop.verification import Call, difference, record_calls, training_difference

_LOGGER = logging.getLogger("fpn_kernels")

_Model = TypeVar("_Model", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `fuse` did.

    Attributes:
        fused: module path to the dialect it speaks.
        left: module path to the reason why it is as it was.
    """

    fused: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{path or '(the model itself)'}: fused ({dialect})" for path, dialect in self.fused.items()]
        lines += [f"{path or '(the model itself)'}: left, {reason}" for path, reason in self.left.items()]
        return "\n".join(lines) or "no feature pyramid network"


@overload
def fuse(model: _Model, *, verify: Any = None, report: Literal[False] = False) -> _Model: ...


@overload
def fuse(model: _Model, *, verify: Any = None, report: Literal[True]) -> tuple[_Model, FusionReport]: ...


def fuse(model: _Model, *, verify: Any = None, report: bool = False) -> _Model | tuple[_Model, FusionReport]:
    """Makes every feature pyramid in a model compute by the fused calls, in place.

    Knows torchvision's `FeaturePyramidNetwork` (as in its detectors), Detectron2's `FPN`, MMDetection's `FPN`, the
    single-file networks with `toplayer`, `latlayer{i}` and `smooth{i}` (kuangliu/pytorch-fpn and the common ResNet
    FPN), SAM 2's `FpnNeck`, the merges of segmentation_models_pytorch's FPN decoder and EfficientDet-style nodes whose
    merge is a plain sum.  None of these packages is imported.

    Only the computation changes: a fused module keeps its parameters, keys, hooks, name, mode and device, and its
    class becomes a subclass of its own, so `isinstance`, optimisers, checkpoints, `DistributedDataParallel`,
    `copy.deepcopy`, `pickle` and `torch.save` go on working (reading a pickled fused model needs this library; see
    `unfuse`).  Under autocast the fused calls run in the autocast dtype with float32 sums.  Fuse a model before
    `fully_shard`.

    Blocks that carry hooks, are parametrised, were patched, wrapped or replaced (LoRA, quantised) are called as they
    are, as often and in the order as before.  A fused pyramid runs the forward of its own class where a functorch
    transform, forward-mode AD, a TorchScript or symbolic tracer, a hook of all modules or a replaced
    `torch.nn.functional.conv2d`, `interpolate` or `batch_norm` looks on, and where that forward or a method that it
    calls was replaced since.

    Before anything is swapped, a copy of each pyramid with random weights is run on a small input on the CPU, both
    ways, in eval mode and in training.  A fork, another version or a subclass that computes something else, or calls
    its blocks in another order, is left as it is; so is one whose forward was decorated or patched, or that overrides
    a method which the forward calls.  No generator of yours, forced backend or mode of another thread is touched.

    Args:
        model: any module; also a pyramid itself.
        verify: an example input; a tuple is the positional arguments (so wrap an input that is a tuple in another).
            The model is run before and after, in eval mode, and the results of each pyramid are compared within the
            tolerance of their dtype.  Then copies of each pyramid, fused and not, train for three steps on the maps
            that it was given first: their results, gradients and buffers are compared, too.  Where a pyramid cannot
            be copied or trained, the logger says so.
        report: return the `FusionReport` too, which names what was fused, and what was left and why.  The logger
            "fpn_kernels" is told the same.

    Returns:
        `model`; with `report`, ``(model, FusionReport)``.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model holds no pyramid that can be fused, or one with an option that cannot be served (the
            message names the module and the option); nothing is changed then.  Fuse a submodule to leave another out.
        RuntimeError: `verify` found a difference (the message names the module, the level and the error); the model
            is as it was.

    Cost:
        Moves no bytes of the model: it keeps its parameters.  The copy for the trial takes 4 bytes per parameter of one
        pyramid at a time, on the CPU.  `verify` runs the model twice, and each pyramid nine times forward and backward,
        and keeps a copy of its arguments and results in bytes for each call and step; at a time it holds one copy of
        one pyramid (a whole network, where that is the pyramid) with its gradients.

    Source:
        The classes named above, as their libraries publish them; each dialect's file in `fpn_kernels.interop` names its
        own.  What the fused calls compute is `fpn_kernels.top_down_pathway` and `fpn_kernels.output_conv`.

    Example:
        ```python
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        fpn_kernels.fuse(model)
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = list(find(model))
    _require_servable(model, found)
    chosen = [(each, each.forward) for each in found if each.forward is not None]
    pyramids = {each.path: each.module for each, _ in chosen}
    expected = record_calls(model, pyramids, verify) if verify is not None else {}
    with _all_or_nothing(pyramids):
        for each, forward in chosen:
            swap(each.module, forward)
        if verify is not None:
            found_difference = difference(pyramids, record_calls(model, pyramids, verify), expected)
            found_difference = found_difference or _training_difference(pyramids, expected)
            if found_difference is not None:
                raise RuntimeError(f"verify: {found_difference}; the model is as it was")
    result = FusionReport(
        {each.path: each.dialect for each, _ in chosen}, {each.path: each.left for each in found if each.left}
    )
    for line in str(result).splitlines():
        _LOGGER.info("fuse: %s", line)
    return (model, result) if report else model


def unfuse(model: _Model) -> _Model:
    """Gives every module that `fuse` changed its own forward back, in place.

    Do so before `torch.jit.script`, or before pickling a whole model for a reader without this library; a
    `state_dict` is the same either way.

    Args:
        model: any module, fused or not.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a wrapper (FSDP, say) has changed a fused module's class since; nothing is changed then.

    Cost:
        Moves no bytes: each module's class is set back.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    fused = [(path, module) for path, module in model.named_modules() if is_fused(module)]
    for path, module in fused:
        if was_rewrapped(module):
            raise ValueError(
                f"model: the class of {path or 'the model itself'} was changed to {type(module)} after it was fused;"
                " undo that first"
            )
    for _, module in fused:
        restore(module)
    return model


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


@contextlib.contextmanager
def _all_or_nothing(pyramids: Mapping[str, nn.Module]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for module in pyramids.values():
            if is_fused(module):
                restore(module)
        raise


def _require_servable(model: nn.Module, found: list[Found]) -> None:
    for each in found:
        if each.refused is not None:
            raise ValueError(f"model: {each.path or 'the model itself'} ({each.dialect}) has {each.refused}")
    if any(each.forward is not None or each.served for each in found):
        return
    left = "".join(f"; {each.path or 'the model itself'} ({each.dialect}): {each.left}" for each in found)
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise ValueError(f"model: no feature pyramid to fuse in {type(model).__name__} (known: {known}){left}")
