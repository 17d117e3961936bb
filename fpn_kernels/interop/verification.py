"""Running a model before and after it is fused, and comparing what its pyramids return."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpn_kernels.backends import convolution
from fpn_kernels.interop.comparison import first_difference, tolerance


def record_outputs(model: nn.Module, pyramids: Mapping[str, nn.Module], example: Any) -> dict[str, list[Any]]:
    """What each pyramid returns, call by call, while the model runs on the example.

    In eval mode and without gradients, so that no statistic moves; from the same random state each time, which is
    put back, as are the modes.
    """
    outputs: dict[str, list[Any]] = {path: [] for path in pyramids}

    def hook(path: str) -> Any:
        return lambda module, inputs, output: outputs[path].append(pytree.tree_map_only(Tensor, torch.clone, output))

    handles = [module.register_forward_hook(hook(path)) for path, module in pyramids.items()]
    arguments = example if isinstance(example, tuple) else (example,)
    try:
        with _in_eval_mode(model), _seeded(model), torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def difference(pyramids: Mapping[str, nn.Module], actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first level of a pyramid that is not what it was, with the error; or None."""
    for path, module in pyramids.items():
        name = path or "the model itself"
        if not expected[path]:
            return f"{name}: the example does not reach it"
        limit = _limit(module, expected[path])
        for call, (left, right) in enumerate(zip(actual[path], expected[path], strict=True)):
            found = first_difference(left, right, limit)
            if found is not None:
                which = f", call {call}" if len(expected[path]) > 1 else ""
                return f"{name}{which}: {found}"
    return None


def _limit(module: nn.Module, outputs: Any) -> float:
    """The tolerance of the least precise dtype that takes part: of parameters, results or autocast."""
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    tensors += list(module.parameters())
    dtypes = {tensor.dtype for tensor in tensors}
    devices = {tensor.device.type for tensor in tensors}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    return tolerance(*dtypes, tf32="cuda" in devices and convolution.tf32_is_allowed())


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _seeded(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
