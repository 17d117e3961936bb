"""Which blocks of a pyramid can be replaced by a fused call, and the parameters of that call.

A block is a convolution, alone or followed by a norm in an `nn.Sequential`.  The fused call bypasses the
modules themselves, so it is taken only where calling them could have no effect but the convolution and the
norm: anything that was hooked, patched or replaced runs as the module it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.modules.module as module_globals
from torch import Tensor, nn

from fpn_kernels.modules.batch_norm import fold, has_fixed_statistics


def _everything_is_observed() -> bool:
    """Whether someone hooked all modules."""
    hooks = module_globals
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def fused_parameters(block: nn.Module, kernel_size: int) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias that compute `block` in one convolution, or None where it must run as a module.

    Args:
        block: a level's inner or layer block.
        kernel_size: 1 for a lateral connection, 3 (padding 1) for an output convolution.
    """
    if isinstance(block, nn.Sequential):
        modules = tuple(block)
        if not _is_pristine(block, nn.Sequential.forward) or not 1 <= len(modules) <= 2:
            return None
        return convolution_parameters(modules[0], modules[1] if len(modules) == 2 else None, kernel_size)
    return convolution_parameters(block, None, kernel_size)


def convolution_parameters(
    convolution: nn.Module,
    norm: nn.Module | None,
    kernel_size: int,
    *,
    forward: Callable[..., Any] = nn.Conv2d.forward,
) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias that compute ``norm(convolution(x))`` in one convolution, or None where they must run.

    For blocks of other libraries, which hold the two in containers of their own; whether the container itself
    may be bypassed is for the caller to say.

    Args:
        convolution: the convolution.
        norm: the norm after it, or None.
        kernel_size: as in `fused_parameters`.
        forward: the forward that the class of `convolution` must have.
    """
    if _everything_is_observed():
        return None
    if not isinstance(convolution, nn.Conv2d) or not _is_plain(convolution, kernel_size, forward):
        return None
    if norm is not None and (is_observed(norm) or not has_fixed_statistics(norm)):
        return None
    # Read once: a parametrised weight is computed by the reading, and some (spectral norm) advance by it.
    weight, bias = _parameters(convolution)
    if hasattr(type(weight), "__tensor_flatten__"):
        return None  # a wrapper (DTensor, a quantised weight): only the module's own call knows what it means
    return (weight, bias) if norm is None else fold(weight, bias, norm)


def _parameters(convolution: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    held = convolution._parameters
    if type(convolution) is nn.Conv2d and "weight" in held and "bias" in held:
        # What `nn.Module.__getattr__` would find, which takes 0.9 us each (one core of Zen 3).
        return cast(Tensor, held["weight"]), held["bias"]
    return convolution.weight, convolution.bias


def _is_plain(convolution: nn.Conv2d, kernel_size: int, forward: Callable[..., Any]) -> bool:
    """Whether this is the convolution that the fused calls compute, called by nobody else's code."""
    return (
        _is_pristine(convolution, forward)
        and type(convolution)._conv_forward is nn.Conv2d._conv_forward
        and convolution.kernel_size == (kernel_size, kernel_size)
        and convolution.padding == (kernel_size // 2, kernel_size // 2)
        and convolution.stride == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )


def _is_pristine(module: nn.Module, forward: Callable[..., Any]) -> bool:
    # Parametrisations swap a module's class for a subclass that inherits forward: they pass, a subclass with
    # a forward of its own does not.
    return type(module).forward is forward and not is_observed(module)


def is_observed(module: nn.Module) -> bool:
    """Whether someone hooked this module, or put a forward of their own on the instance."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
