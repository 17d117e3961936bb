"""Running a model before and after it is fused, and comparing what its pyramids return and how they train."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpn_kernels.backends import convolution
from fpn_kernels.interop.comparison import first_difference, relative_error, roundoff, tolerance
from fpn_kernels.interop.dialect import Random
from fpn_kernels.interop.randomness import OwnRandomNumbers

_STEPS = 3
# Of a parameter's norm: small enough that no run leaves the range of float16.
_STEP_SIZE = 1e-3
# Gradients that cancel (of a bias before BatchNorm in training) are as inexact as the large ones beside them.
_CANCELLED = 0.1
# How much more than one rounding of parameters and inputs the roundings of another order of sums may change.
_AMPLIFIED = 16


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a pyramid: its arguments and what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


def record_calls(model: nn.Module, pyramids: Mapping[str, nn.Module], example: Any) -> dict[str, list[Call]]:
    """What each pyramid is given and returns, call by call, while the model runs on the example.

    In eval mode and without gradients, so that no statistic moves; with random numbers of its own, the same each time.
    The modes are put back.
    """
    calls: dict[str, list[Call]] = {path: [] for path in pyramids}
    given: dict[str, tuple[Any, Any]] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[path] = _copied((args, kwargs))

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            args, kwargs = given.pop(path)
            calls[path].append(Call(args, kwargs, _copied(output)))

        return hook

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
    """The first level of a pyramid that is not what it was, with the error; or None."""
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
    """What differs after a few training steps of a fused pyramid and of the same one as it was; or None.

    Training may amplify roundings (BatchNorm over few values, say): how much is seen by a third run, of the pyramid as
    it was with its parameters and inputs changed by one rounding.  All are copies, one after the other, so the module
    itself is not touched; its hooks see the copies.

    Raises:
        Exception: the module cannot be copied, or trained as it was; nothing is known then.
    """
    dtypes, tf32 = _dtypes(module, [call.output])
    expected = _train(_copy(module), original, call)
    rounded = _train(_copy(module), original, call, changed_by=roundoff(*dtypes, tf32=tf32))
    try:
        actual = _train(_copy(module), type(module), call)
    except Exception as error:
        return f"in training: {type(error).__name__}: {error}"
    limit = tolerance(*dtypes, tf32=tf32)
    for number, steps in enumerate(zip(actual, expected, rounded, strict=True)):
        found = _difference_of_steps(*steps, limit)
        if found is not None:
            return f"training step {number}: {found}"
    return None


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step leaves.

    Attributes:
        output: what the pyramid returned.
        gradients: of its parameters and inputs, by name; those that there are.
        buffers: its buffers, by name.
    """

    output: Any
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All that are compared by their values, by name."""
        leaves, _ = pytree.tree_flatten_with_path((self.output, dict(self.buffers)))
        found = {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
        found = {
            f"output{name[3:]}" if name.startswith("[0]") else f"buffer {name[3:]}": x for name, x in found.items()
        }
        return {name: x for name, x in found.items() if x.is_floating_point()}


def _difference_of_steps(actual: Step, expected: Step, rounded: Step, limit: float) -> str | None:
    for kind in ("output", "buffers"):  # all but the values of floating-point tensors
        found = first_difference(getattr(actual, kind), getattr(expected, kind), float("inf"))
        if found is not None:
            return str(found)
    if actual.gradients.keys() != expected.gradients.keys():
        name = min(actual.gradients.keys() ^ expected.gradients.keys())
        return f"the gradient of {name} is {'one that was not there' if name in actual.gradients else 'missing'}"
    norms = [float(gradient.double().norm()) for gradient in expected.gradients.values()]
    floor = _CANCELLED * max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    for name, want in expected.gradients.items():
        bound = max(limit, _AMPLIFIED * _error(rounded.gradients[name], want, floor))
        error = _error(actual.gradients[name], want, floor)
        if error > bound:
            return f"the gradient of {name}: relative error {error:.3g}, above {bound:.3g}"
    theirs, changed = actual.tensors(), rounded.tensors()
    for name, want in expected.tensors().items():
        bound = max(limit, _AMPLIFIED * _error(changed[name], want))
        error = _error(theirs[name], want)
        if error > bound:
            return f"{name}: relative error {error:.3g}, above {bound:.3g}"
    return None


def _error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The `relative_error`, of a tensor whose norm is at least `floor`."""
    norm = float(torch.where(expected.isfinite(), expected, 0.0).double().norm())
    error = relative_error(actual, expected)
    return error * norm / floor if norm < floor else error


def _train(module: nn.Module, cls: type[nn.Module], call: Call, changed_by: float = 0.0) -> list[Step]:
    """A few steps of a module, as one of class `cls`: each of its outputs, gradients and buffers."""
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
    return (
        x * (1 + changed_by * random.normal(*x.shape).to(x.device).sign()).to(x.dtype) if x.is_floating_point() else x
    )


def _descend(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                step = _STEP_SIZE * parameter.norm() / parameter.grad.norm().clamp(min=1e-6)
                parameter.sub_(parameter.grad * step)
                parameter.grad = None


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy whose hooks are those of the module, not copies of them and of all that they hold."""
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
    """The dtypes that take part: of parameters, results or autocast; and whether TF32 does."""
    tensors = [*_tensors(outputs), *module.parameters()]
    devices = {tensor.device.type for tensor in tensors if not tensor.is_meta}
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    return dtypes, "cuda" in devices and convolution.tf32_is_allowed()


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
