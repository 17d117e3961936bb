"""Which path a call takes to an operator: PyTorch's dispatcher, or a bypass that does what the dispatcher would do.

The dispatcher costs the host 2.5 us per `upsample_add` under `inference_mode`, 8 us without gradients, and 12 to 16 us
more where a gradient is recorded; the check here costs 2.1 us (one core of an Intel Xeon).  A call therefore bypasses
the dispatcher where the dispatcher would only run the kernel, or the autograd formula and the kernel.  A compiler, a
tracer, a transform, a mode, a profiler or a tensor subclass always gets the dispatcher or standard operators.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The paths, by the attribute of `Operator` that implements each.
KERNEL = "kernel"  # the kernel alone
RECORDED = "recorded"  # autograd, then the kernel
STANDARD = "standard"  # PyTorch's own operators
DISPATCHED = "dispatched"  # PyTorch's dispatcher
CAST = {  # as KERNEL and RECORDED, after autocast, by device type
    "cpu": {KERNEL: "kernel_after_cast_on_cpu", RECORDED: "recorded_after_cast_on_cpu"},
    "cuda": {KERNEL: "kernel_after_cast_on_cuda", RECORDED: "recorded_after_cast_on_cuda"},
}


def _autocast_keys() -> dict[str, Any]:
    """Map each device type for which ATen casts `conv2d` to its autocast dispatch key."""
    casts = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")]
    return {
        name.removeprefix("Autocast").lower(): torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        for name in names
        if casts("aten::conv2d", name)
    }


AUTOCAST_KEYS = _autocast_keys()
_NO_GUARD = contextlib.nullcontext()

PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_REQUIRES_GRAD = operator.attrgetter("requires_grad")

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def is_watched() -> bool:
    """Whether a functorch transform, forward-mode AD or a TorchScript tracer is active in this thread.

    Each of them has to see standard PyTorch operators: a call is then composed of those, and a fused module runs the
    forward of its own class.
    """
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or forward_ad._current_level >= 0 or is_tracing()


def without_autocast(tensors: Iterable[Tensor | None]) -> AbstractContextManager[Any]:
    """A context in which autocast is off for the device of these tensors.

    The arguments of a kernel have already been cast, and a gradient runs in the dtypes of its forward, whatever region
    ``backward()`` is called in.
    """
    for tensor in tensors:
        if tensor is not None:
            device_type = tensor.device.type
            if device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type):
                guard: AbstractContextManager[Any] = torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS[device_type])
                return guard
            break
    return _NO_GUARD


def _bits(*names: str) -> int:
    """A set of dispatch keys as a number with one bit per key."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return int(functools.reduce(operator.or_, keys).raw_repr())


def _make_bypass() -> Callable[[Sequence[Tensor | None]], str | None]:
    """Build the function that returns the bypass of a call, or None where the dispatcher is needed.

    It relies on private functions of torch; where one is missing, every call goes through the dispatcher.
    """
    try:
        included, keys_of = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys  # type: ignore[attr-defined]
        excluded = torch._C._dispatch_tls_local_exclude_set  # type: ignore[attr-defined]
        number_of = torch._C.DispatchKeySet.raw_repr
        function_modes = torch._C._len_torch_function_stack
        profiling = torch._C._autograd._profiler_enabled
        int(forward_ad._current_level)
        # Every thread includes the first two keys; every dense tensor on these devices has the others.
        other_modes = ~_bits("BackendSelect", "ADInplaceOrView")
        devices = [f"{kind}{device}" for kind in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA")]
        other_tensors = ~_bits("ADInplaceOrView", *devices)
        autograd = _bits("AutogradOther")
    except (AttributeError, TypeError):
        return lambda tensors: None

    def bypass(tensors: Sequence[Tensor | None]) -> str | None:
        if included().raw_repr() & other_modes or function_modes() or profiling() or forward_ad._current_level >= 0:
            return None
        first = tensors[0] if tensors else None
        if first is None:
            return None
        given = [tensor for tensor in tensors if tensor is not None]
        if not PLAIN_TENSORS.issuperset(map(type, given)):
            return None
        for keys in {*map(number_of, map(keys_of, given))}:
            if keys & other_tensors:
                return None
        recorded = torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, given))
        # Below autograd (e.g. inside another library's operator) nothing is recorded, whatever the flags are.
        recorded = recorded and not excluded().raw_repr() & autograd
        path = RECORDED if recorded else KERNEL
        device_type = first.device.type
        return CAST[device_type][path] if torch.is_autocast_enabled(device_type) else path

    return bypass


_bypass = _make_bypass()


def path_of(*tensors: Tensor | None) -> str:
    """The path of a call with these tensors; the first, if any, is not None."""
    if torch.compiler.is_compiling():
        # ONNX knows only standard operators.
        to_onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        return STANDARD if to_onnx else DISPATCHED
    bypass = _bypass(tensors)
    if bypass is not None:
        return bypass
    return STANDARD if is_watched() else DISPATCHED
