"""A trial of a fused forward against the module's own, with random weights and a small random input.

The name and attributes of a class identify a dialect, but its code may be a fork, another version or have an
overridden method.  So a copy of each module without hooks runs once on the CPU before anything is swapped.  Its
parameters are random, because an output layer that starts at zero would hide all layers before it.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpn_kernels.interop.dialect import Dialect, Random
from fpn_kernels.interop.equivalence import OwnRandomNumbers, first_difference
from fpn_kernels.interop.swapping import FusedForward, fused_class
from fpn_kernels.operators.dispatch import force_in_this_thread

# Another order of float32 sums differs by about 1e-6; a wrong pixel, level or weight by about 1e-1.
_TOLERANCE = 1e-4


class TrialFailedError(Exception):
    """The module could not be run on the random input."""


def same_forward(module: nn.Module, dialect: Dialect) -> type[FusedForward] | str:
    """The forward of the dialect that computes the same as the module, or the difference in words.

    Both return the same results with every block fused and with every block called as a module; in the second run they
    also call the same modules in the same order.

    Raises:
        TrialFailedError: the copy of the module could not be made or run.
    """
    random = Random()
    try:
        copied = _random_copy(module, dialect.stand_ins(module, random), random)
        arguments = dialect.example(copied, random)
        with _recorded(copied) as calls:
            expected = _run(copied, type(module), arguments)
    except Exception as error:
        raise TrialFailedError(f"{type(error).__name__}: {error}") from error
    difference = ""
    for forward in dialect.forwards:
        cls = fused_class(type(module), forward)
        try:
            results = [_run(copied, cls, arguments)]
            with _recorded(copied) as own_calls:
                results.append(_run(copied, cls, arguments))
        except Exception as error:
            difference = f"{type(error).__name__}: {error}"
            continue
        found = [first_difference(each, expected, _TOLERANCE) for each in results]
        if found == [None, None] and own_calls == calls:
            return forward
        difference = difference or found[0] or found[1] or _first_call(own_calls, calls)
    return difference


def _first_call(actual: list[str], expected: list[str]) -> str:
    """The first difference of two sequences of calls, in words."""
    for left, right in zip(actual, expected, strict=False):
        if left != right:
            return f"calls {right} where {left} is expected"
    return f"makes {len(expected)} calls of modules where {len(actual)} are expected"


@contextlib.contextmanager
def _recorded(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list to which each call of a submodule appends its name."""
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda part, inputs: calls.append(name)

    parts = [(name, part) for name, part in module.named_modules() if part is not module]
    handles = [part.register_forward_pre_hook(hook(name)) for name, part in parts]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _random_copy(module: nn.Module, stand_ins: Mapping[str, nn.Module], random: Random) -> nn.Module:
    """A float32 copy on the CPU with random tensors and no hooks."""
    memo: dict[int, Any] = {id(module.get_submodule(name)): stand_in for name, stand_in in stand_ins.items()}
    replaced = {id(part) for name in stand_ins for part in module.get_submodule(name).modules()}
    for part in module.modules():
        if id(part) in replaced:
            continue
        for name, value in part.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):  # computed by a hook (old-style spectral_norm)
                memo[id(value)] = _random_like(value, random)
        for parameter in part._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_random_like(parameter, random))
        for buffer in part._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _random_like(buffer, random, positive=True)  # it may be a variance
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def _random_like(tensor: Tensor, random: Random, positive: bool = False) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    if positive or tensor.dim() < 2:
        return random.positive(*tensor.shape)
    fan_in = max(tensor[0].numel(), 1) if tensor.shape[0] else 1
    return random.normal(*tensor.shape).div_(fan_in**0.5)


def _run(module: nn.Module, cls: type[nn.Module], arguments: tuple[Any, ...]) -> Any:
    """The outputs in eval mode and in training of the module as one of class `cls`; its buffers and modes return."""
    kept = module.__class__, {id(part): part.training for part in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    # On eager, because a backend that was forced for another device might refuse the call.
    with torch.no_grad(), torch.autocast("cpu", enabled=False), force_in_this_thread("eager"):
        try:
            module.__class__ = cls
            results = []
            for training in (False, True):
                module.train(training)
                with OwnRandomNumbers():
                    results.append(module(*pytree.tree_map_only(Tensor, torch.clone, arguments)))
        finally:
            module.__class__ = kept[0]
            for part in module.modules():
                part.training = kept[1][id(part)]
            for buffer, value in buffers:
                buffer.copy_(value)
    return pytree.tree_map_only(Tensor, torch.clone, results)
