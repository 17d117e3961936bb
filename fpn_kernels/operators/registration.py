"""How an operator is registered with torch: the library that holds them, autograd, functorch and autocast.

`torch.library.Library.define` and `impl` rather than `custom_op`, whose wrapper costs the host some microseconds
more per call.  The autograd kernel is this library's own rather than `torch.library.register_autograd`'s, which drops
the tangents of forward-mode AD and changes the context that the threads of a backward share.
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

# What a call meets first where a functorch transform (vmap, grad, jvp, ...) is active.
_FUNCTORCH = "FuncTorchDynamicLayerFrontMode"


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Registers an operator on every device; returns its qualified name."""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, lambda *arguments, **keywords: _standard(name)(*arguments, **keywords), _FUNCTORCH)
    for way in (direct.KERNELS, *direct.KERNELS_OF_CAST.values()):
        setattr(way, name, kernel)
    qualified = f"fpn_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    return qualified


def _standard(name: str) -> Callable[..., Any]:
    form: Callable[..., Any] = getattr(direct.STANDARD, name)
    return form


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
            is called where a call bypasses the dispatcher and some tensor requires a gradient.
    """
    name = qualified.split("::")[1]
    kernel = getattr(direct.KERNELS, name)
    function = direct.differentiable(name, kernel, backward, setup_context)
    LIBRARY.impl(name, _autograd_kernel(name, function), "Autograd", with_keyset=True)

    def bypass(*arguments: Any, **keywords: Any) -> Any:
        result = None if recorded is None else recorded(*arguments, **keywords)
        return function(kernel, *arguments, **keywords) if result is None else result

    for way in (direct.DIFFERENTIABLE, *direct.DIFFERENTIABLE_OF_CAST.values()):
        setattr(way, name, bypass)


def _autograd_kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher calls for autograd."""
    operator = getattr(torch.ops.fpn_kernels, name).default

    def kernel(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        if direct.is_watched():  # forward-mode AD: a formula has no tangents
            return _standard(name)(*arguments, **keywords)
        after_autograd = keyset & torch._C._after_autograd_keyset

        def redispatch(*arguments: Any, **keywords: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(after_autograd, *arguments, **keywords)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function(redispatch, *arguments, **keywords)
        return redispatch(*arguments, **keywords)

    return kernel


def autocast(qualified: str, maps: int | None = None) -> None:
    """Makes an operator run in the autocast dtype: each float tensor is cast, except float64 (as in ATen).

    Where `maps` is given, only that many of the leading arguments are cast; the others keep their dtype.
    """
    name = qualified.split("::")[1]
    operator = getattr(torch.ops.fpn_kernels, name)
    for device_type in direct.AUTOCAST_KEYS:
        LIBRARY.impl(name, _of_cast(operator, device_type, maps), f"Autocast{device_type.upper()}")
        if device_type in direct.KERNELS_OF_CAST:
            for way in (direct.KERNELS_OF_CAST[device_type], direct.DIFFERENTIABLE_OF_CAST[device_type]):
                setattr(way, name, _of_cast(getattr(way, name), device_type, maps))


def _of_cast(call: Callable[..., Any], device_type: str, maps: int | None) -> Callable[..., Any]:
    """`call` with its arguments in the autocast dtype, and autocast kept away from what is inside."""
    keys = direct.AUTOCAST_KEYS[device_type]

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
