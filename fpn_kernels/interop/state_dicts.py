"""Renames the weights of a pyramid from one dialect to another."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class _Names:
    """The module names of a dialect in a pyramid of `levels` levels; level 0 is the finest.

    Attributes:
        lateral_weight: a regular expression for a lateral weight's key after the prefix, with the number of the level.
        lateral: the lateral convolution of ``(level, levels)``.
        output: the output convolution of ``(level, levels)``, or None.
        extra: the convolution of an extra level (0 is P6) of ``(index, levels)``, or None.
        norms: the possible names of a convolution's norm; the name of a BatchNorm first.
        older: a regular expression for the end of a key from an older version of the library, and its replacement.
    """

    lateral_weight: str
    lateral: Callable[[int, int], str]
    output: Callable[[int, int], str | None] = lambda level, levels: None
    extra: Callable[[int, int], str | None] = lambda index, levels: None
    norms: Callable[[str], tuple[str, ...]] = lambda convolution: ()
    older: tuple[str, str] | None = None


def _from_the_top(level: int, levels: int) -> int:
    return levels - 1 - level


def _kuangliu(top: str | None, other: str) -> Callable[[int, int], Any]:
    return lambda level, levels: top if level == levels - 1 else f"{other}{_from_the_top(level, levels)}"


# Detectron2 numbers a level by log2 of its stride; the coarsest is assumed to have stride 32.
_COARSEST = 5

_DIALECTS = {
    "torchvision": _Names(
        r"inner_blocks\.(\d+)\.0\.weight",
        lambda level, levels: f"inner_blocks.{level}.0",
        lambda level, levels: f"layer_blocks.{level}.0",
        lambda index, levels: f"extra_blocks.p{6 + index}",
        lambda convolution: (convolution.removesuffix(".0") + ".1",) if convolution.endswith(".0") else (),
        # In version 1 of the module, a block is the convolution itself.
        (r"((?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    ),
    "detectron2": _Names(
        r"fpn_lateral(\d+)\.weight",
        lambda level, levels: f"fpn_lateral{_COARSEST + 1 - levels + level}",
        lambda level, levels: f"fpn_output{_COARSEST + 1 - levels + level}",
        lambda index, levels: f"top_block.p{6 + index}",
        lambda convolution: () if convolution.startswith("top_block") else (f"{convolution}.norm",),
    ),
    "mmdet": _Names(
        r"lateral_convs\.(\d+)\.conv\.weight",
        lambda level, levels: f"lateral_convs.{level}.conv",
        lambda level, levels: f"fpn_convs.{level}.conv",
        lambda index, levels: f"fpn_convs.{levels + index}.conv",
        lambda convolution: tuple(convolution.removesuffix("conv") + norm for norm in ("bn", "gn")),
    ),
    "kuangliu": _Names(r"(?:lat|top)layer(\d*)\.weight", _kuangliu("toplayer", "latlayer"), _kuangliu(None, "smooth")),
    "sam2": _Names(r"convs\.(\d+)\.conv\.weight", lambda level, levels: f"convs.{_from_the_top(level, levels)}.conv"),
    "smp": _Names(
        r"p([2-5])(?:\.skip_conv)?\.weight",
        lambda level, levels: f"p{level + 2}" + ("" if level == levels - 1 else ".skip_conv"),
    ),
}
_ALIASES = {"fpn_kernels": "torchvision"}
_EXTRA_LEVELS = 2


def convert_state_dict(state: Mapping[str, Any], source: str, target: str) -> OrderedDict[str, Any]:
    """Renames the weights of a pyramid from one dialect to another; the values are the same objects.

    The dialects are "torchvision" (alias "fpn_kernels": this library's `FeaturePyramidNetwork` has the same keys),
    "detectron2", "mmdet", "kuangliu" (``toplayer``, ``latlayer{i}``, ``smooth{i}``), "sam2" and "smp"
    (segmentation_models_pytorch's FPN decoder).

    A prefix of the keys (``"backbone.fpn."``) is kept.  Other keys (a backbone, a head) and the module versions in a
    `state_dict` pass unchanged.  Torchvision's older keys (``inner_blocks.0.weight``) are accepted.  A level without an
    output convolution in the source gets the identity in a target that has one.  A `state_dict` does not hold the mode
    of the resize, or whether the sum is an average; set these options yourself.

    Args:
        state: a `state_dict` with one or more pyramids of `source`.
        source: the dialect of `state`.
        target: the dialect of the result.

    Returns:
        A new `OrderedDict` for ``load_state_dict(..., strict=True)`` of the target's pyramid.

    Raises:
        TypeError: `state` is not a mapping, or a dialect's name not a string.
        ValueError: a dialect is unknown; `state` holds no pyramid of `source`, or one weight under an older and a newer
            key; or a weight (its key is named) has no place in `target`, such as a norm, an extra level or an output
            convolution other than the identity.

    Cost:
        Moves no bytes of weights, except for a new output convolution: the tensors are the same objects.

    Source:
        The keys of torchvision's `FeaturePyramidNetwork`, Detectron2's and MMDetection's `FPN`, kuangliu/pytorch-fpn,
        SAM 2's `FpnNeck` and segmentation_models_pytorch's `FPNDecoder`.

    Example:
        ```python
        mmdet_neck.load_state_dict(fpn_kernels.convert_state_dict(fpn.state_dict(), "torchvision", "mmdet"))
        ```
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping of names to tensors, got {type(state).__name__}")
    old, new = _dialect("source", source), _dialect("target", target)
    metadata = getattr(state, "_metadata", None)
    state = _renewed(state, old)
    result = OrderedDict(state)
    if metadata is not None:
        # A module needs its version to load an older checkpoint.
        result._metadata = metadata.copy()  # type: ignore[attr-defined]
    pyramids = _find(state, old)
    if not pyramids:
        raise ValueError(f"state: holds no feature pyramid of {source!r} (no key like {old.lateral_weight!r})")
    for prefix, levels in pyramids.items():
        if "smp" in (source, target) and levels != 4:
            raise ValueError(f"state: a pyramid of 'smp' has 4 levels, {prefix or 'this one'} has {levels}")
        renamed, used = _convert(state, prefix, levels, old, new, target)
        for key in used:
            del result[key]
        result.update(renamed)
    return result


def _dialect(argument: str, name: Any) -> _Names:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected the name of a dialect, got {type(name).__name__}")
    if _ALIASES.get(name, name) not in _DIALECTS:
        raise ValueError(f"{argument}: expected one of {(*_DIALECTS, *_ALIASES)}, got {name!r}")
    return _DIALECTS[_ALIASES.get(name, name)]


def _renewed(state: Mapping[str, Any], names: _Names) -> Mapping[str, Any]:
    """The state under today's keys of the dialect."""
    if names.older is None:
        return state
    end, place = re.compile(rf"(?<![^.]){names.older[0]}$"), names.older[1]
    renewed = {end.sub(place, key): value for key, value in state.items()}
    if len(renewed) != len(state):
        raise ValueError("state: expected the keys of one version, got a weight under an older and a newer key")
    return renewed


def _find(state: Mapping[str, Any], names: _Names) -> dict[str, int]:
    """The prefix of each pyramid, with its number of levels."""
    found: dict[str, int] = {}
    for key in state:
        match = re.fullmatch(rf"((?:.*\.)?){names.lateral_weight}", key)
        if match:
            found[match[1]] = found.get(match[1], 0) + 1
    return found


def _convert(
    state: Mapping[str, Any], prefix: str, levels: int, old: _Names, new: _Names, target: str
) -> tuple[dict[str, Any], list[str]]:
    """The weights of one pyramid under the new keys, and their old keys."""
    renamed: dict[str, Any] = {}
    used: list[str] = []

    def rename(before: str, after: str | None) -> None:
        tensors = _tensors(state, prefix + before)
        used.extend(f"{prefix}{before}.{name}" for name in tensors)
        if after is not None:
            renamed.update({f"{prefix}{after}.{name}": value for name, value in tensors.items()})
        elif tensors and not _is_identity(tensors):
            raise ValueError(f"state: {prefix}{before}.{next(iter(tensors))} has no place in the pyramid of {target!r}")

    laterals = [(old.lateral(i, levels), new.lateral(i, levels)) for i in range(levels)]
    missing = [key for lateral, _ in laterals if (key := f"{prefix}{lateral}.weight") not in state]
    if missing:
        raise ValueError(f"state: expected {missing[0]} in a pyramid of {levels} levels")
    outputs = [(old.output(i, levels), new.output(i, levels)) for i in range(levels)]
    extras = [(old.extra(i, levels), new.extra(i, levels)) for i in range(_EXTRA_LEVELS)]
    for before, after in (*laterals, *outputs, *extras):
        if before is None:
            continue
        rename(before, after)
        for norm in old.norms(before):
            # The first name is BatchNorm's, the last that of a norm without statistics.
            names = () if after is None else new.norms(after)
            index = 0 if f"{prefix}{norm}.running_mean" in state else -1
            rename(norm, names[index] if names else None)
    for (lateral, _), (before, after) in zip(laterals, outputs, strict=True):
        if before is None and after is not None:
            identity = _identity(state[f"{prefix}{lateral}.weight"])
            renamed |= {f"{prefix}{after}.{name}": value for name, value in identity.items()}
    return renamed, used


def _tensors(state: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The tensors of one module (not of its children), by name."""
    parts = {key: key.rpartition(".") for key in state}
    return {name: state[key] for key, (owner, _, name) in parts.items() if owner == module}


def _identity(lateral_weight: Tensor) -> dict[str, Tensor]:
    channels = lateral_weight.shape[0]
    weight = lateral_weight.new_zeros(channels, channels, 3, 3)
    weight[range(channels), range(channels), 1, 1] = 1
    return {"weight": weight, "bias": lateral_weight.new_zeros(channels)}


def _is_identity(tensors: Mapping[str, Any]) -> bool:
    if set(tensors) != {"weight", "bias"} or tensors["weight"].shape[2:] != (3, 3):
        return False
    identity = _identity(tensors["weight"])
    return all(torch.equal(tensors[name], identity[name]) for name in identity)
