"""Checks whether a call of a module runs other code than torch's and that of the module's class.

The fused calls bypass modules and functions, so a pyramid uses them only where a call of these has no other effect.
Each call compares the functions of today with those captured at import: a few tenths of a microsecond per module.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.modules.module as module_globals
from torch import Tensor, nn

from fpn_kernels.operators.paths import is_watched


def defining_class(cls: type, name: str = "forward") -> type:
    """The class in the method resolution order that defines the method."""
    return next(base for base in cls.__mro__ if name in base.__dict__)


def _is_original(function: Any, module_name: str, qualified_name: str) -> bool:
    """Whether a function was written under this name in this module and is neither replaced nor decorated."""
    return (
        isinstance(function, types.FunctionType)
        and not hasattr(function, "__wrapped__")
        and function.__globals__.get("__name__") == module_name
        and function.__qualname__ == qualified_name
    )


def is_original_method(cls: type, name: str, defined_as: str | None = None) -> bool:
    """Whether a method is the one in the source of the class that defines it."""
    owner = defining_class(cls, name)
    function = owner.__dict__[name]
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    return _is_original(function, owner.__module__, f"{owner.__qualname__}.{defined_as or name}")


def torch_method(cls: type, name: str, defined_as: str | None = None) -> Any:
    """A method of one of torch's classes, or, if it was replaced before this import, an object equal to nothing."""
    return getattr(cls, name) if is_original_method(cls, name, defined_as) else object()


def _torch_function(name: str) -> Any:
    function = getattr(F, name)
    builtin = isinstance(function, types.BuiltinFunctionType)
    return function if builtin or _is_original(function, F.__name__, name) else object()


_CALL = torch_method(nn.Module, "__call__", "_wrapped_call_impl")
_CALL_IMPL = torch_method(nn.Module, "_call_impl")
_GETATTR = torch_method(nn.Module, "__getattr__")
_GETATTRIBUTE = object.__getattribute__
_CONV2D, _INTERPOLATE, _BATCH_NORM = map(_torch_function, ("conv2d", "interpolate", "batch_norm"))


def is_altered(module: nn.Module) -> bool:
    """Whether a call of `module` runs other code than the forward of its class.

    Examples are a hook, a parametrisation, a compiled call, and a method of the call that was replaced on the instance,
    its class or `nn.Module`.  `_slow_forward` is not checked: it runs only under a tracer, see `must_step_aside`.
    """
    cls, held = type(module), module.__dict__
    return bool(
        (cls.__call__ is not _CALL and not _is_of_export(cls.__call__))
        or cls._call_impl is not _CALL_IMPL
        or (cls.__getattr__ is not _GETATTR and not _is_of_export(cls.__getattr__))
        or cls.__getattribute__ is not _GETATTRIBUTE
        or "forward" in held
        or "_conv_forward" in held
        or "_call_impl" in held
        or "_compiled_call_impl" in held
        or held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "parametrizations" in held["_modules"]
    )


def _is_of_export(function: Any) -> bool:
    """Whether torch.export or `make_fx` put this method on `nn.Module` to record names.

    Symbolic tracing does the same, but `must_step_aside` detects its proxies.
    """
    return getattr(function, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace"


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call of `module`, of any library's class, runs the forward written in that class and nothing else."""
    return not is_altered(module) and _has_own_forward(type(module))


def _has_own_forward(cls: type) -> bool:
    return _is_own_forward(cls, cls.forward)  # type: ignore[attr-defined]


# As `torch.compiler.assume_constant_result` does, but without an import of the compiler.
_has_own_forward._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(256)
def _is_own_forward(cls: type, forward: Callable[..., Any]) -> bool:
    return is_original_method(cls, "forward")


def must_step_aside(arguments: Iterable[Any]) -> bool:
    """Whether a pyramid has to call its modules and PyTorch's functions, because other code observes them.

    This is so under a transform, forward-mode AD, a TorchScript tracer (`is_watched`) or symbolic tracing, with a
    global module hook, and where `conv2d`, `interpolate` or `batch_norm` was replaced (e.g. by an operation counter).

    Args:
        arguments: the arguments of the pyramid's call.
    """
    return bool(
        is_watched()
        or F.conv2d is not _CONV2D
        or F.interpolate is not _INTERPOLATE
        or F.batch_norm is not _BATCH_NORM
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
        or _holds_proxy(arguments)
    )


def _holds_proxy(arguments: Iterable[Any]) -> bool:
    """Whether one of the arguments, or a value in a container among them, is a proxy of symbolic tracing."""
    for argument in arguments:
        if type(argument) is Tensor:
            continue
        values = argument.values() if isinstance(argument, dict) else argument
        for value in values if isinstance(argument, (dict, list, tuple)) else (argument,):
            if type(value) is not Tensor and isinstance(value, torch.fx.Proxy):
                return True
    return False


def called_methods(cls: type) -> dict[str, Any]:
    """The forward of a class and the methods that it calls, directly or through one another, by name."""
    methods: dict[str, Any] = {}
    names = ["forward"]
    while names:
        name = names.pop()
        function = getattr(cls, name, None)
        if name in methods or not isinstance(function, types.FunctionType):
            continue
        if name != "forward" and defining_class(cls, name) in (nn.Module, object):
            continue
        methods[name] = function
        inner: Any = function
        while hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        names += _names_in(inner.__code__)
    return methods


def _names_in(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names
