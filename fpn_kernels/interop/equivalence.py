"""Comparison of two runs of a module: equal random numbers, and the first difference of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_SEED = 0


def roundoff(*dtypes: torch.dtype, tf32: bool = False) -> float:
    """The relative error of one rounding in the least precise of the dtypes."""
    unit = max(torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.is_floating_point)
    return max(unit, 2.0**-11) if tf32 else unit


def tolerance(*dtypes: torch.dtype, tf32: bool = False) -> float:
    """The largest relative difference between two correct implementations, in the least precise of the dtypes.

    In 16 bits (and TF32) implementations round at different places, a few times per level; in float32 and float64 they
    differ in the order of their sums.
    """
    unit = roundoff(*dtypes, tf32=tf32)
    return (8 if unit >= 2.0**-12 else 512) * unit


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm; equal infinities, and NaN in both, are no error."""
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, actual - expected).norm()
    scale = torch.where(expected.isfinite(), expected, 0.0).norm()
    error = float(difference / scale.clamp(min=torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def first_difference(actual: Any, expected: Any, limit: float) -> str | None:
    """The first place where two nested outputs differ by more than `limit`, and how; or None.

    Args:
        actual: tensors in any nesting of lists, tuples and mappings.
        expected: the same.
        limit: the largest relative error of a map.
    """
    actual_leaves, actual_spec = pytree.tree_flatten_with_path(actual)
    expected_leaves, expected_spec = pytree.tree_flatten_with_path(expected)
    if actual_spec != expected_spec:
        return f"the output is {actual_spec}, but was {expected_spec}"
    for (path, left), (_, right) in zip(actual_leaves, expected_leaves, strict=True):
        found = _difference(left, right, limit)
        if found is not None:
            return f"output{pytree.keystr(path)}: {found}" if path else found
    return None


def _difference(actual: Any, expected: Any, limit: float) -> str | None:
    if not isinstance(expected, Tensor):
        return None if actual is expected or actual == expected else f"is {actual!r}, but was {expected!r}"
    for aspect in ("shape", "dtype", "device"):
        if getattr(actual, aspect) != getattr(expected, aspect):
            return f"has {aspect} {getattr(actual, aspect)}, but had {getattr(expected, aspect)}"
    bound = limit if expected.is_floating_point() else 0.0
    error = relative_error(actual, expected)
    return f"relative error {error:.3g}, above {bound:.3g} ({expected.dtype})" if error > bound else None


class OwnRandomNumbers(TorchDispatchMode):
    """Gives every random operator of this thread a generator with a fixed seed, one per device and use of the mode.

    The generators of PyTorch and of other threads do not move.  Fused attention with dropout accepts no generator, so
    it still draws from the default one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def _call(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("generator") is not None:
            return func(*args, **given)
        if func is torch.ops.aten.native_dropout.default:
            return self._dropout(*args, **given)
        if func in _LIKE:
            like = torch.empty_like(args[0], **given)
            return _LIKE[func](like, self._generator(like.device)) if like.is_floating_point() else func(*args, **given)
        redirected = _with_generator(func)
        if redirected is None:
            return func(*args, **given)
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
        device = torch.device(given.get("device") or "cpu") if device is None else device
        return redirected(*args, **given, generator=self._generator(device))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(_SEED)
        return self._generators[device]

    def _dropout(self, x: Tensor, p: float, train: bool | None = None) -> tuple[Tensor, Tensor]:
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=self._generator(x.device))
        return x * kept * (0.0 if p == 1 else 1 / (1 - p)), kept


# Set outside the class body: PyTorch wraps a method defined there in a function that imports the compiler (seconds).
OwnRandomNumbers.__torch_dispatch__ = OwnRandomNumbers._call  # type: ignore[assignment,method-assign]

_LIKE: dict[Any, Callable[[Tensor, torch.Generator], Tensor]] = {
    torch.ops.aten.rand_like.default: lambda like, generator: like.uniform_(generator=generator),
    torch.ops.aten.randn_like.default: lambda like, generator: like.normal_(generator=generator),
}


def _with_generator(func: Any) -> Any:
    """The overload of a random operator with the same arguments and a generator, or None."""
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        others = [argument.name for argument in overload._schema.arguments]
        if "generator" in others and [name for name in others if name != "generator"] == names:
            return overload
    return None
