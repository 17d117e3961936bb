"""Random numbers from separate generators: two runs draw the same numbers, and the user's generators do not move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SEED = 0


class OwnRandomNumbers(TorchDispatchMode):
    """Passes its own generator to every random operator of this thread.  Each use of the mode seeds it again.

    The generators of PyTorch and of other threads are not touched.  Fused attention with dropout takes no generator:
    it goes on drawing from the default one.
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


# Not in the class's body: what stands there PyTorch wraps in a function that imports the compiler, which takes seconds.
OwnRandomNumbers.__torch_dispatch__ = OwnRandomNumbers._call  # type: ignore[assignment,method-assign]

_LIKE: dict[Any, Callable[[Tensor, torch.Generator], Tensor]] = {
    torch.ops.aten.rand_like.default: lambda like, generator: like.uniform_(generator=generator),
    torch.ops.aten.randn_like.default: lambda like, generator: like.normal_(generator=generator),
}


def _with_generator(func: Any) -> Any:
    """The overload of a random operator that takes a generator besides the same arguments, or None."""
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        others = [argument.name for argument in overload._schema.arguments]
        if "generator" in others and [name for name in others if name != "generator"] == names:
            return overload
    return None
