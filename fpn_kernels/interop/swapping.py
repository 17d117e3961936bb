"""Gives a module another forward by making its class a generated subclass.

The instance keeps its `__dict__`: parameters, buffers, hooks, name, training mode and options are the same objects as
before.  Nothing is stored on it, so setting the class back restores it completely.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn

from fpn_kernels.modules.alterations import called_methods, must_step_aside


class FusedForward:
    """Base class of the fused forwards of the dialects.

    The `forward` of a dialect reads the options of the foreign class from the instance at each call, and calls
    ``super().forward`` for arguments that it does not support.
    """

    _fpn_kernels_original: type[nn.Module]
    _fpn_kernels_forward: type[FusedForward]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot find the generated subclass by name, so it stores the two classes that `_new_instance` needs.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments[0] is self._fpn_kernels_class():  # type: ignore[attr-defined]
            return (_new_instance, (self._fpn_kernels_original, self._fpn_kernels_forward, *arguments[1:]), *rest)
        return (function, arguments, *rest)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile the fused forward of {type(self).__name__}: call"
            " fpn_kernels.unfuse(model) before scripting (torch.compile and torch.export take fused models)"
        )

    @classmethod
    def _fpn_kernels_class(cls) -> type:
        """The class that `swap` set; a wrapper such as FSDP may have derived another class from it since."""
        return next(base for base in cls.__mro__ if "_fpn_kernels_original" in base.__dict__)


_CLASSES: dict[tuple[type[nn.Module], type[FusedForward]], type[nn.Module]] = {}
_LOCK = threading.Lock()


def fused_class(original: type[nn.Module], forward: type[FusedForward]) -> type[nn.Module]:
    """The subclass of `original` that computes by `forward`; the same object for the same pair in all threads."""
    with _LOCK:
        key = (original, forward)
        if key not in _CLASSES:
            body = {
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
                "_fpn_kernels_original": original,
                "_fpn_kernels_forward": forward,
                "forward": _dispatching_forward(original, forward),
            }
            # new_class finds the right metaclass (MMDetection's and Detectron2's classes have ABCMeta).
            bases = (forward, original)
            _CLASSES[key] = types.new_class(original.__name__, bases, {}, lambda names: names.update(body))
        return _CLASSES[key]


def _dispatching_forward(original: type[nn.Module], dialect: type[FusedForward]) -> Callable[..., Any]:
    """The forward of a fused class: the dialect's, or the original's where that one could give another result.

    The original's runs where other code observes the modules and functions inside (`must_step_aside`), where the
    original's forward or a method that it calls was replaced since, on the class or the instance, and for arguments
    that the dialect does not know.
    """
    methods = tuple(called_methods(original).items())
    names = tuple(inspect.signature(dialect.forward).parameters)[1:]  # type: ignore[attr-defined]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = len(args) + len(kwargs) == len(names) and set(kwargs) == set(names[len(args) :])
        if not known or _was_altered(self, original, methods) or must_step_aside((*args, *kwargs.values())):
            return original.forward(self, *args, **kwargs)
        return dialect.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return forward


def _was_altered(module: nn.Module, original: type[nn.Module], methods: Sequence[tuple[str, Any]]) -> bool:
    for name, method in methods:
        # A forward on the instance is not checked: if it calls this one, it does so on purpose.
        if getattr(original, name) is not method or (name in module.__dict__ and name != "forward"):
            return True
    return False


def swap(module: nn.Module, forward: type[FusedForward]) -> None:
    """Give `module` the fused forward, unless another thread has done so."""
    cls = type(module)
    if not issubclass(cls, FusedForward):
        module.__class__ = fused_class(cls, forward)


def is_fused(module: nn.Module) -> bool:
    """Whether the module computes by a fused forward."""
    return isinstance(module, FusedForward)


def was_rewrapped(module: nn.Module) -> bool:
    """Whether a wrapper (FSDP, a parametrisation) has derived another class from the fused one."""
    return "_fpn_kernels_original" not in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a fused module before `swap`."""
    original: type[nn.Module] = type(module).__dict__["_fpn_kernels_original"]
    return original


def restore(module: nn.Module) -> None:
    """Set the class of a fused module back."""
    module.__class__ = original_class(module)


def _new_instance(original: type[nn.Module], forward: type[FusedForward], *arguments: Any) -> Any:
    cls = fused_class(original, forward)
    return cls.__new__(cls, *arguments)
