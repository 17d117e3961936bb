"""How an operator is told to torch: the library that holds them, and autocast.

`torch.library.Library.define` and `impl` rather than `custom_op`, whose wrapper costs the host some microseconds
more a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpn_kernels import compatibility
from fpn_kernels.operators import direct

compatibility.require_first_import()  # this file may be reloaded
LIBRARY = torch.library.Library("fpn_kernels", "DEF")
compatibility.mark_first_import()

# Autocast is a property of these devices; on the others torch has no such dispatch key for Python to serve.
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Registers an operator on every device; returns its qualified name."""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    for way in (direct.KERNELS, *direct.KERNELS_OF_CAST.values()):
        setattr(way, name, kernel)
    qualified = f"fpn_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    return qualified


def differentiable(
    qualified: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    recorded: Callable[..., Any] | None = None,
) -> None:
    """Registers the autograd formula of an operator.

    Args:
        qualified: what `define` returned.
        backward, setup_context: as for `torch.library.register_autograd`.
        recorded: computes the operator by operators of PyTorch's that autograd records by itself, or returns None; it
            is asked where a call goes past the dispatcher and some tensor asks for a gradient.
    """
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    name = qualified.split("::")[1]
    kernel = getattr(direct.KERNELS, name)
    differentiable = direct.differentiable(name, kernel, backward, setup_context, recorded)
    for way in (direct.DIFFERENTIABLE, *direct.DIFFERENTIABLE_OF_CAST.values()):
        setattr(way, name, differentiable)


def autocast(qualified: str, maps: int | None = None) -> None:
    """Makes an operator run in the autocast dtype: each float tensor is cast, except float64 (as in ATen).

    Where `maps` is given, only that many of the leading arguments are cast; the others keep their dtype.
    """
    name = qualified.split("::")[1]
    for device_type, key in _AUTOCAST_KEYS.items():
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        LIBRARY.impl(name, _of_cast(getattr(torch.ops.fpn_kernels, name), device_type, keys, maps), key)
        for way in (direct.KERNELS_OF_CAST[device_type], direct.DIFFERENTIABLE_OF_CAST[device_type]):
            setattr(way, name, _of_cast(getattr(way, name), device_type, keys, maps))


def _of_cast(call: Callable[..., Any], device_type: str, keys: Any, maps: int | None) -> Callable[..., Any]:
    """`call` with its arguments in the autocast dtype, and autocast kept away from what is inside."""

    def kernel(*arguments: Any, **keywords: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        with torch._C._ExcludeDispatchKeyGuard(keys):
            cut = len(arguments) if maps is None else maps
            maps_cast = (cast(value, dtype) for value in arguments[:cut])
            return call(*maps_cast, *arguments[cut:], **keywords)

    return kernel


def cast(value: Any, dtype: torch.dtype) -> Any:
    """An argument as autocast passes it on."""
    if isinstance(value, (list, tuple)):
        return [cast(item, dtype) for item in value]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)
