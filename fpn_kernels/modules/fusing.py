"""The weight and bias with which a fused call replaces a block of a pyramid.

A block is a convolution, alone or followed by a norm in an `nn.Sequential`.  The fused call bypasses its modules, so a
block that was hooked, patched, parametrised or replaced has no such parameters and is called as a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fpn_kernels.modules.alterations import is_altered, torch_method
from fpn_kernels.modules.batch_norm import fold, has_fixed_statistics, tensors_of

_SEQUENTIAL_FORWARD = torch_method(nn.Sequential, "forward")
_CONV_FORWARD = torch_method(nn.Conv2d, "forward")
_CONV_INNER_FORWARD = torch_method(nn.Conv2d, "_conv_forward")
_IDENTITY_FORWARD = torch_method(nn.Identity, "forward")

_TENSORS = (Tensor, nn.Parameter)
_WIDE = (torch.float32, torch.float64)

Parameters = tuple[Tensor, Tensor | None]


def fused_parameters(block: nn.Module, kernel_size: int) -> Parameters | None:
    """The weight and bias of one convolution that computes `block`, or None where it must run as a module.

    Args:
        block: a lateral or output block of a level.
        kernel_size: 1 for a lateral block, 3 (padding 1) for an output block.
    """
    if not isinstance(block, nn.Sequential):
        return convolution_parameters(block, None, kernel_size)
    modules = tuple(block) if is_plain_sequential(block) else ()
    if not 1 <= len(modules) <= 2:
        return None
    return convolution_parameters(modules[0], modules[1] if len(modules) == 2 else None, kernel_size)


def is_plain_sequential(block: nn.Module) -> bool:
    """Whether a call of `block` calls each of its modules and does nothing else."""
    return type(block).forward is _SEQUENTIAL_FORWARD and not is_altered(block)


def is_identity(block: nn.Module) -> bool:
    """Whether a call of `block` returns its input and has no other effect."""
    return type(block).forward is _IDENTITY_FORWARD and not is_altered(block)


def convolution_parameters(
    convolution: nn.Module,
    norm: nn.Module | None,
    kernel_size: int,
    *,
    forward: Callable[..., Any] = _CONV_FORWARD,
) -> Parameters | None:
    """The weight and bias that compute ``norm(convolution(x))`` in one convolution, or None where both must run.

    Also for blocks of other libraries, whose containers the caller has to check.

    Args:
        convolution: the convolution.
        norm: the norm after it, or None.
        kernel_size: as in `fused_parameters`.
        forward: the expected forward of the convolution's class.
    """
    if not isinstance(convolution, nn.Conv2d) or not _is_plain(convolution, kernel_size, forward):
        return None
    parameters = _parameters(convolution)
    if parameters is None or norm is None:
        return parameters
    weight, bias = parameters
    # Not in 16 bits: a mean divided by sqrt(eps) overflows float16 where convolution and norm do not.
    if weight.dtype not in _WIDE or is_autocast(weight):
        return None
    if is_altered(norm) or not has_fixed_statistics(norm):
        return None
    if not all(_is_dense(tensor) and tensor.dtype == weight.dtype for tensor in tensors_of(norm)):
        return None
    return fold(weight, bias, norm)


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is enabled for the device of a tensor."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _parameters(convolution: nn.Conv2d) -> Parameters | None:
    """The weight and bias of a convolution; None where they are computed or are of a tensor subclass.

    Read from `__dict__`, because `nn.Module.__getattr__` takes 0.9 us each (one core of Zen 3).
    """
    held = convolution.__dict__
    registered = held["_parameters"]
    found: list[Any] = []
    for name in ("weight", "bias"):
        if name in held:  # `nn.DataParallel` and FSDP replace a parameter by a plain attribute
            found.append(held[name])
        elif name in registered and (type(convolution) is nn.Conv2d or not hasattr(type(convolution), name)):
            found.append(registered[name])
        else:
            return None
    weight, bias = found
    return (weight, bias) if _is_dense(weight) and (bias is None or _is_dense(bias)) else None


def _is_dense(value: Any) -> bool:
    """Whether a tensor is of torch's own classes: only a module's call knows the values of another subclass."""
    cls = type(value)
    # torch.export without Dynamo replaces parameters by fake tensors.
    return cls in _TENSORS or cls.__module__.startswith("torch._subclasses.")


def _is_plain(convolution: nn.Conv2d, kernel_size: int, forward: Callable[..., Any]) -> bool:
    """Whether the fused calls compute this convolution, and its call runs no other code."""
    cls = type(convolution)
    return (
        cls.forward is forward
        and cls._conv_forward is _CONV_INNER_FORWARD
        and not is_altered(convolution)
        and convolution.kernel_size == (kernel_size, kernel_size)
        and convolution.padding == (kernel_size // 2, kernel_size // 2)
        and convolution.stride == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )
