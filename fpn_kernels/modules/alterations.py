"""Whether a call runs torch's own code and that of a module's class alone, or somebody else's as well.

The fused calls bypass modules and functions, so they are used only where calling those could have no other effect.
What was captured at import is compared at each call: it costs a few tenths of a microsecond per module.
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
    """The class whose method of this name a class has."""
    return next(base for base in cls.__mro__ if name in base.__dict__)


def is_own(function: Any, module_name: str, qualified_name: str) -> bool:
    """Whether a function is the one written under this name in this module: neither replaced nor decorated."""
    return (
        isinstance(function, types.FunctionType)
        and not hasattr(function, "__wrapped__")
        and function.__globals__.get("__name__") == module_name
        and function.__qualname__ == qualified_name
    )


def is_own_method(cls: type, name: str) -> bool:
    """Whether a method is the one written in the class that defines it."""
    owner = defining_class(cls, name)
    function = owner.__dict__[name]
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    return is_own(function, owner.__module__, f"{owner.__qualname__}.{name}")


def torch_method(cls: type, name: str, defined_as: str | None = None) -> Any:
    """A method of one of torch's classes; what nothing is equal to where it was replaced before this import."""
    function = getattr(cls, name)
    owner = defining_class(cls, name)
    ours = is_own(function, owner.__module__, f"{owner.__qualname__}.{defined_as or name}")
    return function if ours else object()


def _torch_function(name: str) -> Any:
    function = getattr(F, name)
    builtin = isinstance(function, types.BuiltinFunctionType)
    return function if builtin or is_own(function, F.__name__, name) else object()


_CALL = torch_method(nn.Module, "__call__", "_wrapped_call_impl")
_CALL_IMPL = torch_method(nn.Module, "_call_impl")
_GETATTR = torch_method(nn.Module, "__getattr__")
_GETATTRIBUTE = object.__getattribute__
_CONV2D, _INTERPOLATE, _BATCH_NORM = map(_torch_function, ("conv2d", "interpolate", "batch_norm"))


def is_altered(module: nn.Module) -> bool:
    """Whether a call of `module` runs anything besides the forward of its class.

    That is a hook, a parametrisation, a compiled call, or a method of the call that the instance, its class or
    `nn.Module` itself has from elsewhere.  `_slow_forward` is called under a tracer only, where `must_step_aside`.
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
    """Whether a method is what torch.export and `make_fx` put on `nn.Module` to take down names.

    Symbolic tracing does the same, but calls with values that stand for others, where `must_step_aside`.
    """
    return getattr(function, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace"


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call of `module`, of any library's class, runs the forward written in that class and nothing else."""
    return not is_altered(module) and _has_own_forward(type(module))


def _has_own_forward(cls: type) -> bool:
    return _is_own_forward(cls, cls.forward)  # type: ignore[attr-defined]


# What `torch.compiler.assume_constant_result` sets, which imports the compiler.
_has_own_forward._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(256)
def _is_own_forward(cls: type, forward: Callable[..., Any]) -> bool:
    return is_own_method(cls, "forward")


def every_module_is_hooked() -> bool:
    """Whether someone hooked all modules."""
    hooks = module_globals
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def must_step_aside(arguments: Iterable[Any]) -> bool:
    """Whether a pyramid has to be composed of its modules and PyTorch's functions, as somebody looks at all of them.

    A transform, forward-mode AD or a tracer does (`is_watched`), symbolic tracing, a hook of all modules, and whoever
    replaced one of the functions that a pyramid is made of (a profiler that counts operations, circular padding).

    Args:
        arguments: those of the pyramid's call.
    """
    return bool(
        is_watched()
        or F.conv2d is not _CONV2D
        or F.interpolate is not _INTERPOLATE
        or F.batch_norm is not _BATCH_NORM
        or every_module_is_hooked()
        or holds_proxy(arguments)
    )


def holds_proxy(arguments: Iterable[Any]) -> bool:
    """Whether one of the arguments, or of the values in one, stands for a value in a symbolic trace."""
    for argument in arguments:
        if type(argument) is Tensor:
            continue
        values = argument.values() if isinstance(argument, dict) else argument
        for value in values if isinstance(argument, (dict, list, tuple)) else (argument,):
            if type(value) is not Tensor and isinstance(value, torch.fx.Proxy):
                return True
    return False


def called_methods(cls: type) -> dict[str, Any]:
    """The forward of a module's class and the methods that it calls, directly or through one of them, by name."""
    methods: dict[str, Any] = {}
    names = ["forward"]
    while names:
        name = names.pop()
        function = getattr(cls, name, None)
        if name in methods or not isinstance(function, types.FunctionType) or _is_nn_modules(cls, name):
            continue
        methods[name] = function
        inner: Any = function
        while hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        names += _names_in(inner.__code__)
    return methods


def _is_nn_modules(cls: type, name: str) -> bool:
    return name != "forward" and defining_class(cls, name) in (nn.Module, object)


def _names_in(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return names
