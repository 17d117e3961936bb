"""Weights of one dialect's pyramid under the names of another."""

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
    """How a dialect names the modules of a pyramid of `levels` levels; level 0 is the finest.

    Attributes:
        lateral_weight: a regular expression for the rest of a key after the pyramid's prefix, with the dialect's own
            number of the level.
        lateral: the lateral convolution of ``(level, levels)``.
        output: the output convolution, None where the level has none.
        extra: the convolution of an extra level above (0 is P6), None where the dialect has none.
        norms: given a convolution's name, the names its norm may have; BatchNorm's first.
        older: a regular expression for the end of a key that an older version of the library wrote, which the library
            still loads, and what takes the place of that end.
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


# Detectron2 names a level by log2 of its stride: that of the coarsest is taken to be 5 (stride 32).
_COARSEST = 5

_DIALECTS = {
    "torchvision": _Names(
        r"inner_blocks\.(\d+)\.0\.weight",
        lambda level, levels: f"inner_blocks.{level}.0",
        lambda level, levels: f"layer_blocks.{level}.0",
        lambda index, levels: f"extra_blocks.p{6 + index}",
        lambda convolution: (convolution.removesuffix(".0") + ".1",) if convolution.endswith(".0") else (),
        # Version 1 of the module: a block is the convolution itself.
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

    The names of the dialects are "torchvision" (this library's `FeaturePyramidNetwork` has the same keys, so
    "fpn_kernels" is an alias), "detectron2", "mmdet", "kuangliu" (``toplayer``, ``latlayer{i}``, ``smooth{i}``), "sam2"
    and "smp" (segmentation_models_pytorch's FPN decoder).

    The keys of the pyramid may have a prefix (``"backbone.fpn."``), which is kept; keys of anything else (a backbone, a
    head) pass unchanged, and so do the versions of modules that `state_dict` notes.  Older keys of
    torchvision's (``inner_blocks.0.weight``) are accepted.  Where the source has no output convolution at a level and
    the target has one, it becomes the identity, which computes the same.  The options that are no weights (the mode of
    the resize, sum or average) are not in a `state_dict` and stay the caller's matter.

    Args:
        state: a `state_dict` that holds one or more pyramids of `source`.
        source: the dialect it is in.
        target: the dialect wanted.

    Returns:
        A new `OrderedDict`, which the target's pyramid loads with ``strict=True``.

    Raises:
        TypeError: `state` is not a mapping, or a dialect's name not a string.
        ValueError: a dialect is unknown; `state` holds no pyramid of `source`, or a weight under an older and a newer
            key; or a weight has no place in `target` (a norm, an extra level, an output convolution other than the
            identity), with its key.

    Cost:
        Moves no bytes of weights: the tensors are the same objects, of any dtype.  Only an output convolution that the
        source does not have is made.

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
        # The versions of modules, by which they load what an older one has saved.
        result._metadata = metadata.copy()  # type: ignore[attr-defined]
    pyramids = _find(state, old)
    if not pyramids:
        raise ValueError(f"state: holds no feature pyramid of {source!r} (no key like {old.lateral_weight!r})")
    for prefix, levels in pyramids.items():
        if "smp" in (source, target) and levels != 4:
            raise ValueError(f"state: a pyramid of 'smp' has 4 levels, {prefix or 'this one'} has {levels}")
        part = _convert(state, prefix, levels, old, new, target)
        for key in [key for key in result if key in part.used]:
            del result[key]
        result.update(part.renamed)
    return result


@dataclasses.dataclass
class _Part:
    renamed: dict[str, Any]
    used: set[str]


def _dialect(argument: str, name: Any) -> _Names:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected the name of a dialect, got {type(name).__name__}")
    if _ALIASES.get(name, name) not in _DIALECTS:
        raise ValueError(f"{argument}: expected one of {(*_DIALECTS, *_ALIASES)}, got {name!r}")
    return _DIALECTS[_ALIASES.get(name, name)]


def _renewed(state: Mapping[str, Any], names: _Names) -> Mapping[str, Any]:
    """The state with the keys that the dialect has today."""
    if names.older is None:
        return state
    end, place = re.compile(rf"(?<![^.]){names.older[0]}$"), names.older[1]
    renewed = {end.sub(place, key): value for key, value in state.items()}
    if len(renewed) != len(state):
        raise ValueError("state: expected the keys of one version, got a weight under an older and a newer key")
    return renewed


def _find(state: Mapping[str, Any], names: _Names) -> dict[str, int]:
    """Prefix of each pyramid to the number of its levels."""
    found: dict[str, int] = {}
    for key in state:
        match = re.fullmatch(rf"((?:.*\.)?){names.lateral_weight}", key)
        if match:
            found[match[1]] = found.get(match[1], 0) + 1
    return found


def _convert(state: Mapping[str, Any], prefix: str, levels: int, old: _Names, new: _Names, target: str) -> _Part:
    part = _Part({}, set())
    missing = [key for i in range(levels) if (key := f"{prefix}{old.lateral(i, levels)}.weight") not in state]
    if missing:
        raise ValueError(f"state: expected {missing[0]} in a pyramid of {levels} levels")
    places: list[tuple[str | None, str | None]] = [
        (old.lateral(i, levels), new.lateral(i, levels)) for i in range(levels)
    ]
    outputs = [(old.output(i, levels), new.output(i, levels)) for i in range(levels)]
    places += outputs
    places += [(old.extra(i, levels), new.extra(i, levels)) for i in range(_EXTRA_LEVELS)]
    for before, after in places:
        if before is None:
            continue
        _rename(state, prefix + before, None if after is None else prefix + after, part, target)
        for norm in old.norms(before):
            tensors = _tensors(state, prefix + norm)
            norms = () if after is None else new.norms(after)
            # The names after the first are those of a norm without statistics.
            place = None if not norms else norms[0 if "running_mean" in tensors else -1]
            _rename(state, prefix + norm, None if place is None else prefix + place, part, target)
    for level, (before, after) in enumerate(outputs):
        if before is None and after is not None:
            weight = state[f"{prefix}{old.lateral(level, levels)}.weight"]
            part.renamed |= {f"{prefix}{after}.{name}": value for name, value in _identity(weight).items()}
    return part


def _tensors(state: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The tensors of one module (not of its children), by name."""
    found = {}
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        if owner == module:
            found[name] = value
    return found


def _rename(state: Mapping[str, Any], before: str, after: str | None, part: _Part, target: str) -> None:
    tensors = _tensors(state, before)
    part.used |= {f"{before}.{name}" for name in tensors}
    if after is not None:
        part.renamed |= {f"{after}.{name}": value for name, value in tensors.items()}
    elif tensors and not _is_identity(tensors):
        raise ValueError(f"state: {before}.{next(iter(tensors))} has no place in the pyramid of {target!r}")


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
