"""`fuse(verify=...)`: compares the results and the training of each pyramid before and after fusing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpn_kernels import compatibility
from fpn_kernels.interop.dialect import Random
from fpn_kernels.interop.equivalence import OwnRandomNumbers, first_difference, relative_error, roundoff, tolerance

_STEPS = 3
# Of the norm of all parameters: small enough that no run leaves the range of float16.
_STEP_SIZE = 1e-3
# A gradient that cancels (a bias before BatchNorm in training) has the absolute error of the large gradients, as has a
# mean near zero.  So errors are relative to this part of the largest norm at least.
_CANCELLED = 0.1
# Bound on the errors, in multiples of the effect of one rounding of parameters and inputs.
_AMPLIFIED = 16


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a pyramid: its arguments and its result."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


def record_calls(model: nn.Module, pyramids: Mapping[str, nn.Module], example: Any) -> dict[str, list[Call]]:
    """The calls of each pyramid while the model runs on the example.

    In eval mode and without gradients, so that no statistic moves, with the same random numbers each time.
    """
    calls: dict[str, list[Call]] = {path: [] for path in pyramids}
    given: dict[str, tuple[Any, Any]] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[path] = _copied((args, kwargs))

        return hook

    def after(path: str) -> Any:
        return lambda module, args, output: calls[path].append(Call(*given.pop(path), _copied(output)))

    handles = []
    for path, module in pyramids.items():
        handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after(path)))
    arguments = example if isinstance(example, tuple) else (example,)
    try:
        with _in_eval_mode(model), OwnRandomNumbers(), torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def difference(
    pyramids: Mapping[str, nn.Module], actual: Mapping[str, list[Call]], expected: Mapping[str, list[Call]]
) -> str | None:
    """The first map of a pyramid that differs, with the error; or None."""
    for path, module in pyramids.items():
        name = path or "the model itself"
        if not expected[path]:
            return f"{name}: the example does not reach it"
        dtypes, tf32 = _dtypes(module, [call.output for call in expected[path]])
        limit = tolerance(*dtypes, tf32=tf32)
        for number, (left, right) in enumerate(zip(actual[path], expected[path], strict=True)):
            found = first_difference(left.output, right.output, limit)
            if found is not None:
                which = f", call {number}" if len(expected[path]) > 1 else ""
                return f"{name}{which}: {found}"
    return None


def training_difference(module: nn.Module, original: type[nn.Module], call: Call) -> str | None:
    """The first difference in a few training steps of a fused pyramid and of the original; or None.

    Training may amplify roundings, e.g. by BatchNorm over few values.  A third run measures this: the original with
    parameters and inputs changed by one rounding.  All runs are on copies, which share the module's hooks.

    Raises:
        Exception: the original cannot be copied or trained, so nothing was compared.
    """
    dtypes, tf32 = _dtypes(module, [call.output])
    expected = _train(_copy(module), original, call)
    rounded = _train(_copy(module), original, call, changed_by=2 * roundoff(*dtypes, tf32=tf32))
    try:
        actual = _train(_copy(module), type(module), call)
    except Exception as error:
        return f"in training: {type(error).__name__}: {error}"
    limit = tolerance(*dtypes, tf32=tf32)
    for number, steps in enumerate(zip(actual, expected, rounded, strict=True)):
        found = difference_of_steps(*steps, limit)
        if found is not None:
            return f"training step {number}: {found}"
    return None


@dataclasses.dataclass(frozen=True)
class Step:
    """The results of a training step.

    Attributes:
        output: the output of the pyramid.
        gradients: the gradients of its parameters and inputs, by name.
        buffers: its buffers, by name.
    """

    output: Any
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    def errors(self, other: Step) -> dict[str, float]:
        """The relative error of each floating-point tensor of another step, by name."""
        found: dict[str, float] = {}
        for kind, name, floor in (
            ("output", "output", 0.0),
            ("gradients", "gradient", _CANCELLED),
            ("buffers", "buffer", _CANCELLED),
        ):
            mine, theirs = (pytree.tree_flatten_with_path(getattr(step, kind))[0] for step in (self, other))
            pairs = [
                (name + pytree.keystr(path), got, want)
                for (path, want), (_, got) in zip(mine, theirs, strict=True)
                if isinstance(want, Tensor) and want.is_floating_point()
            ]
            lowest = floor * max((_norm(want) for _, _, want in pairs), default=0.0)
            found |= {where: _error(got, want, lowest) for where, got, want in pairs}
        return found


def difference_of_steps(actual: Step, expected: Step, rounded: Step, limit: float) -> str | None:
    """The first difference of two steps above `limit` and above the effect of roundings; or None.

    Args:
        actual: a step of the fused pyramid.
        expected: the same step of the original.
        rounded: the same step of the original changed by one rounding.
        limit: the largest relative error if training amplifies nothing.
    """
    for kind in ("output", "buffers"):  # containers, shapes, dtypes and integers; the values follow below
        found = first_difference(getattr(actual, kind), getattr(expected, kind), float("inf"))
        if found is not None:
            return found
    if actual.gradients.keys() != expected.gradients.keys():
        name = min(actual.gradients.keys() ^ expected.gradients.keys())
        return f"the gradient of {name} is {'new' if name in actual.gradients else 'missing'}"
    errors, natural = expected.errors(actual), expected.errors(rounded)
    bound = max(limit, _AMPLIFIED * max(natural.values(), default=0.0))
    for name, error in errors.items():
        if error > bound:
            return f"{name}: relative error {error:.3g}, above {bound:.3g}"
    return None


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    """The error relative to the norm of a tensor, or to `floor` if that is larger."""
    norm = _norm(expected)
    error = relative_error(actual, expected)
    return error * norm / floor if norm < floor else error


def _norm(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0.0).double().norm())


def _train(module: nn.Module, cls: type[nn.Module], call: Call, changed_by: float = 0.0) -> list[Step]:
    """A few training steps of a module as one of class `cls`."""
    random, steps = Random(), []
    args, kwargs = call.args, call.kwargs
    if changed_by:
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: _rounded(x, changed_by, random), (args, kwargs))
        for parameter in module.parameters():
            parameter.data = _rounded(parameter.data, changed_by, random)
    module.__class__ = cls
    module.train()
    random = Random()
    with torch.enable_grad(), OwnRandomNumbers():
        for _ in range(_STEPS):
            given_args, given_kwargs = pytree.tree_map_only(Tensor, _as_leaf, (args, kwargs))
            inputs = {f"input {n}": x for n, x in enumerate(_tensors((given_args, given_kwargs)))}
            output = module(*given_args, **given_kwargs)
            results = [x for x in _tensors(output) if x.requires_grad]
            upstream = [random.normal(*x.shape).to(x) / max(x.shape[-1], 1) for x in results]
            torch.autograd.backward(results, upstream)
            leaves: dict[str, Tensor] = {**dict(module.named_parameters()), **inputs}
            gradients = {name: x.grad.clone() for name, x in leaves.items() if x.grad is not None}
            steps.append(Step(_copied(output), gradients, _copied(dict(module.named_buffers()))))
            _descend(module)
    return steps


def _rounded(x: Tensor, changed_by: float, random: Random) -> Tensor:
    """A tensor with each element changed by this part of itself, up or down."""
    if not x.is_floating_point():
        return x
    factors = 1 + changed_by * random.normal(*x.shape).double().sign()
    return x * factors.to(x.device, x.dtype)


def _descend(module: nn.Module) -> None:
    """One step of gradient descent, of a fixed length: a gradient may consist of rounding errors alone."""
    trained = [(p, p.grad) for p in module.parameters() if p.grad is not None]
    gradient = sum(_norm(grad) ** 2 for _, grad in trained) ** 0.5
    step = _STEP_SIZE * sum(_norm(p.detach()) ** 2 for p, _ in trained) ** 0.5 / max(gradient, 1e-6)
    with torch.no_grad():
        for parameter, grad in trained:
            parameter.sub_(step * grad)
            parameter.grad = None
    torch.clear_autocast_cache()  # it holds casts of the old parameters


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy that shares the hooks of the module, since a hook may hold anything."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict(value)
    copied: nn.Module = copy.deepcopy(module, memo)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), tree)


def _as_leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _dtypes(module: nn.Module, outputs: Any) -> tuple[set[torch.dtype], bool]:
    """The dtypes of parameters, results and autocast; and whether TF32 is in use."""
    tensors = [*_tensors(outputs), *module.parameters()]
    devices = {tensor.device.type for tensor in tensors if not tensor.is_meta}
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    return dtypes, "cuda" in devices and compatibility.tf32_is_allowed()


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
