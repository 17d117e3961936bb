"""The class of all operators: from one call to the record, the plan and the kernel, with autograd and autocast.

    functional.lateral_connection
      -> Operator.__call__            picks a path (`paths.py`)
      -> Operator.kernel              builds the call's record and gets its plan
      -> dispatch.select              on a miss of the plan cache: checks, then the first backend that serves the call
      -> <operator>/<backend>.plan    returns a function of the call, which is cached
      -> that function                allocates the result and launches

Operators are registered by `torch.library.Library.define` and `impl`; the wrapper of `custom_op` costs the host some
microseconds more per call.  The autograd kernel is our own: `torch.library.register_autograd` drops the tangents of
forward-mode AD and changes a context that several threads of a backward share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fpn_kernels import compatibility
from fpn_kernels.operators import dispatch, paths, plan_cache

compatibility.require_first_import()  # this file may be reloaded
LIBRARY = torch.library.Library("fpn_kernels", "DEF")
compatibility.mark_first_import()

# Every operator by name; the rooms fill it.
OPERATORS: dict[str, Operator[Any]] = {}

# The dispatch key that a call meets first where a functorch transform (vmap, grad, jvp, ...) is active.
_FUNCTORCH = "FuncTorchDynamicLayerFrontMode"


class Record(Protocol):
    """A call of an operator: a NamedTuple of its arguments in the order of the schema."""

    def check(self) -> None:
        """Raise ValueError or TypeError that names the argument which does not fit."""

    def allocate(self) -> Any:
        """The uninitialised result, with the shapes, dtypes and strides that every backend returns."""

    def empty(self) -> Any:
        """The result where there is nothing to compute (an empty batch, say), else None."""

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""

    def __iter__(self) -> Any: ...

    def __len__(self) -> int: ...


Call = TypeVar("Call", bound=Record)


@dataclasses.dataclass(frozen=True)
class Gradient(Generic[Call]):
    """The autograd formula of an operator.

    Attributes:
        save: takes the autograd context, the call and its result; stores what `backward` needs.
        backward: takes the context and one gradient per result (one list, where the result is a list); returns one
            gradient per positional argument.  ``ctx.wants`` has one flag per positional argument (a list of flags for
            a list): whether it requires a gradient.
        by_aten: takes the call; computes it by operators of PyTorch that autograd records by itself, or returns None.
            Used where a call bypasses the dispatcher and some tensor requires a gradient.
        recorded_by: takes the call and the backend that serves it; returns, for `explain`, which autograd records it.
    """

    save: Callable[[Any, Call, Any], None]
    backward: Callable[..., Any]
    by_aten: Callable[[Call], Any] | None = None
    recorded_by: Callable[[Call, str], str] = lambda call, backend: "one node of this library"


class Operator(Generic[Call]):
    """A torch operator, the call record it takes, and the backends that compute it.

    Args:
        schema: as `torch.library.Library.define` takes it.  No argument before the star has a default: the dispatcher
            drops trailing arguments that equal their defaults, and the autograd formula would return too many
            gradients.
        call: the record, a NamedTuple in the order of the schema.
        backends: backend name to implementation, in any order.
        standard: takes the call; computes it by standard PyTorch operators, for tracers, transforms and exporters.
        gradient: its autograd formula.
        cast: how many leading arguments autocast casts; None for no autocast.
        compose: for an operator that no backend may have as a whole: takes the call and returns its plan's function.
        exported: whether exported programs hold the operator (`decompositions` then lists it).

    Every path of a call is an attribute: `kernel`, `recorded`, `standard`, `dispatched` and the variants after
    autocast; `on` looks one up.
    """

    def __init__(
        self,
        schema: str,
        call: type[Call],
        backends: Mapping[str, dispatch.Implementation],
        *,
        standard: Callable[[Call], Any],
        gradient: Gradient[Call],
        cast: int | None = None,
        compose: dispatch.Composition | None = None,
        exported: bool = False,
    ) -> None:
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        self.name = LIBRARY.define(schema, tags=tags)
        self.call, self.backends, self.compose, self.exported = call, dict(backends), compose, exported
        self._has_lists = "[]" in schema.split("*")[0]
        self.key_of = plan_cache.key_of_lists if "[" in schema else plan_cache.key_of
        self._standard, self._by_aten, self.recorded_by = standard, gradient.by_aten, gradient.recorded_by
        self.function = _autograd_function(self.name, call, gradient)
        self.dispatched = getattr(torch.ops.fpn_kernels, self.name)
        for device_type, attributes in paths.CAST.items():
            for path, attribute in attributes.items():
                run = getattr(self, path)
                setattr(self, attribute, run if cast is None else _after_cast(run, device_type, cast))
        if cast is not None:
            self.standard = _standard_after_cast(self.standard, cast)  # type: ignore[method-assign]
        self._register(cast)
        OPERATORS[self.name] = self

    def _register(self, cast: int | None) -> None:
        LIBRARY.impl(self.name, self.kernel, "CompositeExplicitAutograd")
        LIBRARY.impl(self.name, self.standard, _FUNCTORCH)
        LIBRARY.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"fpn_kernels::{self.name}", self._fake, lib=LIBRARY)
        if cast is not None:
            for device_type in paths.AUTOCAST_KEYS:
                kernel = _after_cast(self.dispatched, device_type, cast)
                LIBRARY.impl(self.name, kernel, f"Autocast{device_type.upper()}")

    def __repr__(self) -> str:
        return f"<operator fpn_kernels::{self.name}>"

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The operator by the shortest path; all positional arguments are tensors, None or lists of tensors."""
        tensors = _flat(arguments) if self._has_lists else arguments
        return getattr(self, paths.path_of(*tensors))(*arguments, **options)

    def on(self, path: str) -> Callable[..., Any]:
        """The operator by a path that `paths.path_of` returned, e.g. for several operators on the same tensors."""
        run: Callable[..., Any] = getattr(self, path)
        return run

    def plan(self, call: Call) -> plan_cache.Plan:
        """The plan of a call, from the plan cache or new."""
        return plan_cache.get_or_make(self, call)

    def kernel(self, *arguments: Any, **options: Any) -> Any:
        """Run the backend's kernel, below autograd and autocast."""
        call = self.call(*arguments, **options)
        return plan_cache.get_or_make(self, call)(call)

    def recorded(self, *arguments: Any, **options: Any) -> Any:
        """Record the operator in the autograd graph, then run the kernel."""
        if self._by_aten is not None:
            result = self._by_aten(self.call(*arguments, **options))
            if result is not None:
                return result
        return self.function(self.kernel, *arguments, **options)

    def standard(self, *arguments: Any, **options: Any) -> Any:
        """Compute the operator by standard PyTorch operators."""
        call = self.call(*arguments, **options)
        if not paths.is_tracing():  # a tracer would record each comparison of sizes; PyTorch's operators check
            call.check()
        return self._standard(call)

    def _fake(self, *arguments: Any, **options: Any) -> Any:
        call = self.call(*arguments, **options)
        call.check()
        return call.allocate()

    def _autograd(self, keyset: Any, *arguments: Any, **options: Any) -> Any:
        """The kernel that the dispatcher calls for autograd."""
        if paths.is_watched():  # forward-mode AD: the formula has no tangents
            return self.standard(*arguments, **options)
        after_autograd = keyset & torch._C._after_autograd_keyset

        def redispatch(*arguments: Any, **options: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.dispatched.default.redispatch(after_autograd, *arguments, **options)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self.function(redispatch, *arguments, **options)
        return redispatch(*arguments, **options)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """An argument after autocast: each float tensor in `dtype`, except float64 (as in ATen)."""
    if isinstance(value, (list, tuple)):
        return [_cast(item, dtype) for item in value]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def _after_cast(run: Callable[..., Any], device_type: str, count: int) -> Callable[..., Any]:
    """`run` on arguments of which autocast has cast the first `count`, with autocast off inside."""
    keys = paths.AUTOCAST_KEYS[device_type]

    def kernel(*arguments: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return run(*(_cast(value, dtype) for value in arguments[:count]), *arguments[count:], **options)

    return kernel


def _standard_after_cast(run: Callable[..., Any], count: int) -> Callable[..., Any]:
    """As `_after_cast`, by PyTorch's public functions: an exporter or a compiler may look on."""

    def standard(*arguments: Any, **options: Any) -> Any:
        first = arguments[0]
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device_type):
            return run(*arguments, **options)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return run(*(_cast(value, dtype) for value in arguments[:count]), *arguments[count:], **options)

    return standard


def _flat(values: Iterable[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list) else (value,))]


def _nested(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flat`; `counts` has the length of each list, and None for an argument that is no list."""
    values = iter(flat)
    return [next(values) if count is None else [next(values) for _ in range(count)] for count in counts]


def _autograd_function(name: str, call: Callable[..., Any], gradient: Gradient[Any]) -> Callable[..., Any]:
    """The operator as an `autograd.Function`.

    Returns:
        A function of a kernel, which computes the operator below autograd, and the operator's arguments.  Lists of
        tensors are passed to autograd one by one.
    """

    def forward(ctx: Any, *values: Any) -> Any:
        *inputs, kernel, options, counts = values
        # Set once: several threads may run the backward of one node at a time.
        ctx.counts, ctx.wants = counts, ctx.needs_input_grad[:-3]
        if counts is not None:
            inputs, ctx.wants = _nested(inputs, counts), _nested(ctx.wants, counts)
        output = kernel(*inputs, **options)
        gradient.save(ctx, call(*inputs, **options), output)
        ctx.lists = isinstance(output, list)
        return tuple(output) if ctx.lists else output

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with paths.without_autocast(grads):
            listed = gradient.backward(ctx, grads) if ctx.lists else gradient.backward(ctx, *grads)
        if not isinstance(listed, tuple):
            listed = (listed,)
        if ctx.counts is not None:
            each = zip(listed, ctx.counts, strict=True)
            # A list of numbers has no gradients: None for each of them.
            listed = _flat([None] * count if grad is None and count is not None else grad for grad, count in each)
        return (*listed, None, None, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    # Not `function.apply`, which checks for functorch first: where a transform is active, no call comes here.
    apply = super(torch.autograd.Function, function).apply

    def record(kernel: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if list not in map(type, inputs):
            return apply(*inputs, kernel, options, None)
        counts = [len(each) if isinstance(each, list) else None for each in inputs]
        return apply(*_flat(inputs), kernel, options, counts)

    return record
