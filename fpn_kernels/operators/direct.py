"""The way to an operator: through torch's dispatcher, or straight to what the dispatcher would call.

`torch.library` serves everything, at a price: from Python to the kernel an `upsample_add` takes 2.5 us under
`inference_mode` and 8 without gradients, and where one is asked for 12 to 16 more than an `autograd.Function` of its
own, because the library's autograd is Python that serves any schema (one core of an Intel Xeon, where an eager
addition takes 0.9, and asking here 2.1).  On a GPU that is time in which nothing is launched.  So where the dispatcher
would do nothing but call the kernel, or the autograd formula and the kernel, that is done here at once.  Wherever a
compiler, a tracer, a transform, a mode, autocast or a profiler may have a say, torch is asked.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# By the operators' names; filled by `registration`.
KERNELS = types.SimpleNamespace()
DIFFERENTIABLE = types.SimpleNamespace()
# Each composed of PyTorch's own; filled by `decompositions`.
STANDARD = types.SimpleNamespace()
# The first two with what they are given cast as autocast does it, by the type of the device.
KERNELS_OF_CAST = {"cpu": types.SimpleNamespace(), "cuda": types.SimpleNamespace()}
DIFFERENTIABLE_OF_CAST = {"cpu": types.SimpleNamespace(), "cuda": types.SimpleNamespace()}


def _autocast_keys() -> dict[str, Any]:
    """The dispatch key of autocast by the type of the device, wherever it casts PyTorch's own convolution."""
    casts = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")]
    return {
        name.removeprefix("Autocast").lower(): torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        for name in names
        if casts("aten::conv2d", name)
    }


AUTOCAST_KEYS = _autocast_keys()
_AS_IT_IS = contextlib.nullcontext()

PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_REQUIRES_GRAD = operator.attrgetter("requires_grad")


is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def is_watched() -> bool:
    """Whether a functorch transform, a level of forward-mode AD or a TorchScript tracer is active in this thread.

    Each of them has to see standard PyTorch operators: then a call is composed of those (`decompositions`), and a
    fused module runs the forward of its own class.
    """
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or forward_ad._current_level >= 0 or is_tracing()


def without_autocast(tensors: Iterable[Tensor | None]) -> AbstractContextManager[Any]:
    """A block in which the device of these tensors has no autocast.

    What an operator computes has been cast already, and its gradient runs as its forward did, whatever region
    ``backward()`` is called in.
    """
    for tensor in tensors:
        if tensor is not None:
            device_type = tensor.device.type
            if device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type):
                guard: AbstractContextManager[Any] = torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS[device_type])
                return guard
            break
    return _AS_IT_IS


def _set(*names: str) -> int:
    """The dispatcher's keys by these names, as a number with a bit for each."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return int(functools.reduce(operator.or_, keys).raw_repr())


def _questions() -> Callable[[Sequence[Tensor | None]], types.SimpleNamespace | None]:
    """Says whether the kernel, or autograd and the kernel, are all that there is to call; where torch tells."""
    try:
        included, keys_of = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys  # type: ignore[attr-defined]
        excluded = torch._C._dispatch_tls_local_exclude_set  # type: ignore[attr-defined]
        number_of = torch._C.DispatchKeySet.raw_repr
        function_modes = torch._C._len_torch_function_stack
        profiling = torch._C._autograd._profiler_enabled
        int(forward_ad._current_level)
        # What every thread has, and every dense tensor on these devices.
        other_modes = ~_set("BackendSelect", "ADInplaceOrView")
        devices = [f"{kind}{device}" for kind in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA")]
        other_tensors = ~_set("ADInplaceOrView", *devices)
        autograd = _set("AutogradOther")
    except (AttributeError, TypeError):
        return lambda tensors: None

    def straight(tensors: Sequence[Tensor | None]) -> types.SimpleNamespace | None:
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
        asked = torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, given))
        # Below autograd (inside another library's operator, say) nothing is recorded, whatever the flags say.
        asked = asked and not excluded().raw_repr() & autograd
        device_type = first.device.type
        if torch.is_autocast_enabled(device_type):
            return (DIFFERENTIABLE_OF_CAST if asked else KERNELS_OF_CAST)[device_type]
        return DIFFERENTIABLE if asked else KERNELS

    return straight


_straight = _questions()


def operators(*tensors: Tensor | None) -> Any:
    """Where to look up the operator for a call with these tensors, of which the first, if any, is not None."""
    if torch.compiler.is_compiling():
        # ONNX knows only standard operators.
        to_onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        return STANDARD if to_onnx else torch.ops.fpn_kernels
    straight = _straight(tensors)
    if straight is not None:
        return straight
    return STANDARD if is_watched() else torch.ops.fpn_kernels


def _flat(values: Iterable[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list) else (value,))]


def _nested(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flat`; `counts` has the length of each list, and None for what is no list."""
    values = iter(flat)
    return [next(values) if count is None else [next(values) for _ in range(count)] for count in counts]


def differentiable(
    name: str, signature: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The operator as an `autograd.Function`.

    Args:
        name: the operator's name.
        signature: any function with its keyword arguments and their defaults.
        backward, setup_context: as for `torch.library.register_autograd`, but that the flags of the inputs that
            require a gradient are ``ctx.wants``, in the structure of the operator's arguments.

    Returns:
        A function of a kernel, which computes the operator below autograd, and the operator's arguments.  Lists of
        tensors are passed to autograd one by one.
    """

    defaults = signature.__kwdefaults__ or {}
    has_keywords = signature.__code__.co_kwonlyargcount > 0

    def forward(ctx: Any, *values: Any) -> Any:
        *inputs, kernel, keywords, counts = values
        # Set once: several threads may run a node's backward at a time.
        ctx.counts, ctx.wants = counts, ctx.needs_input_grad[:-3]
        if counts is not None:
            inputs, ctx.wants = _nested(inputs, counts), _nested(ctx.wants, counts)
        output = kernel(*inputs, **keywords)
        if has_keywords:
            setup_context(ctx, inputs, keywords, output)
        else:
            setup_context(ctx, inputs, output)
        ctx.lists = isinstance(output, list)
        return tuple(output) if ctx.lists else output

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with without_autocast(grads):
            listed = backward(ctx, grads) if ctx.lists else backward(ctx, *grads)
        if not isinstance(listed, tuple):
            listed = (listed,)
        if ctx.counts is not None:
            each = zip(listed, ctx.counts, strict=True)
            # A list of numbers has no gradients: None for all of it.
            listed = _flat([None] * count if grad is None and count is not None else grad for grad, count in each)
        return (*listed, None, None, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    # Not `function.apply`, which asks for functorch first: where a transform is active, a call does not come here.
    apply = super(torch.autograd.Function, function).apply

    def call(kernel: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        options = {**defaults, **keywords}
        if list not in map(type, inputs):
            return apply(*inputs, kernel, options, None)
        counts = [len(each) if isinstance(each, list) else None for each in inputs]
        return apply(*_flat(inputs), kernel, options, counts)

    return call
