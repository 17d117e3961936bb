"""The alterations that users make to a pyramid before or after it is fused."""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import leaves
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree
from twins import CHANNELS, WIDTH

from fpn_kernels.modules import FeaturePyramidNetwork

Draw = random.Random


def ours_of(network: nn.Module) -> nn.Module:
    """This library's module with the parts of torchvision's."""
    ours = FeaturePyramidNetwork(CHANNELS, WIDTH)
    for name in ("inner_blocks", "layer_blocks", "extra_blocks"):
        setattr(ours, name, getattr(network, name))
    return ours.train(network.training)


# --------------------------------------------------------------------------------------------------- edits


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of the pyramid itself, without those of a backbone."""
    outside = ("bottom_up", "conv1", "layer1", "layer2", "layer3", "layer4")
    found = [m for name, m in network.named_modules() if not name.startswith(outside) and isinstance(m, nn.Conv2d)]
    return list(dict.fromkeys(found))


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    inside = set(new.modules())
    places = [(p, name) for p in network.modules() for name, child in p._modules.items() if child is old]
    for parent, name in places:
        if parent not in inside:
            parent._modules[name] = new
    for lists in ("lateral_convs", "output_convs"):  # Detectron2's class reads these
        listed = network.__dict__.get(lists)
        if isinstance(listed, list):
            listed[:] = [new if module is old else module for module in listed]


def _norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if hasattr(m, "running_mean")]


def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The usual tiling patch of `_conv_forward`."""
    p = self.padding[0]
    return F.conv2d(F.pad(x, (p, p, p, p), mode="circular"), weight, bias, self.stride)


class _Subclass(nn.Conv2d):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


class _QuietSubclass(nn.Conv2d):
    """Changes nothing."""


class _Tagged(Tensor):
    """A weight that means another one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.conv2d:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 3 * func(*args, **(kwargs or {})).as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = nn.Parameter(self.detach().clone(), requires_grad=False)
        return memo[id(self)]


class LowRank(nn.Module):
    """A convolution wrapped as LoRA adapters wrap it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.in_channels, self.out_channels = base, base.in_channels, base.out_channels
        kernel, stride, padding = base.kernel_size, base.stride, base.padding
        self.down = nn.Conv2d(base.in_channels, 2, kernel, stride, padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _fit_for_all(network: nn.Module, conv: nn.Conv2d) -> None:
    """One block for all levels that it fits."""
    block = nn.Sequential(nn.ReLU(inplace=True), conv, nn.BatchNorm2d(conv.out_channels))
    for other in convolutions(network):
        if (other.in_channels, other.kernel_size, other.stride) == (conv.in_channels, conv.kernel_size, conv.stride):
            replace(network, other, block)


def _with(conv: nn.Conv2d, **attributes: Any) -> nn.Conv2d:
    for name, value in attributes.items():
        setattr(conv, name, value)
    return conv


def _of_class(conv: nn.Conv2d, cls: type[nn.Conv2d]) -> nn.Conv2d:
    return _with(conv, __class__=cls) if type(conv) is nn.Conv2d else conv


def _if_plain_weight(edit: Callable[[nn.Conv2d], nn.Module]) -> Callable[[nn.Conv2d], nn.Module]:
    """An edit of the weight, unless another edit has replaced it."""
    return lambda conv: edit(conv) if "weight" in conv._parameters and type(conv.weight) is nn.Parameter else conv


def _tagged_weight(conv: nn.Conv2d) -> nn.Conv2d:
    if type(conv) is not nn.Conv2d or "weight" not in conv._parameters:
        return conv
    return _with(conv, weight=nn.Parameter(conv.weight.detach().as_subclass(_Tagged), requires_grad=False))


def _plain_tensor(conv: nn.Conv2d) -> nn.Conv2d:
    """As `nn.DataParallel` makes a replica: tensors in the place of parameters."""
    return conv if conv._forward_pre_hooks else _with(conv, weight=conv._parameters.pop("weight").detach())


def _twice(self: nn.Conv2d, x: Tensor) -> Tensor:
    return 2 * type(self).forward(self, x)


# A convolution to its replacement, which may be the same object.
CONVOLUTION_EDITS: dict[str, Callable[[Any], nn.Module]] = {
    "circular": lambda conv: _with(conv, _conv_forward=types.MethodType(circular, conv)),
    "patched forward": lambda conv: _with(conv, forward=types.MethodType(_twice, conv)),
    "own __call__": lambda conv: _of_class(conv, _Subclass),
    "tagged weight": _tagged_weight,
    "spectral norm": _if_plain_weight(parametrizations.spectral_norm),
    "weight norm": _if_plain_weight(parametrizations.weight_norm),
    "pruned": _if_plain_weight(lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5)),
    "adapter": LowRank,
    "checkpointed": CheckpointWrapper,
    # It changes the map that the next level reads, or has read.
    "activated before": lambda conv: nn.Sequential(nn.ReLU(inplace=True), conv),
    "activated after": lambda conv: nn.Sequential(conv, nn.ReLU(inplace=True)),
    "counting norm": lambda conv: nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)),
}
# After these a fused call still computes the convolution.
QUIET_EDITS: dict[str, Callable[[Any], nn.Module]] = {
    "quiet subclass": lambda conv: _of_class(conv, _QuietSubclass),
    "plain tensors": _if_plain_weight(_plain_tensor),
}


def _of_one(edit: Callable[[nn.Conv2d], nn.Module]) -> Callable[[nn.Module, Draw], None]:
    def edit_one(network: nn.Module, draw: Draw) -> None:
        conv = draw.choice(convolutions(network))
        replace(network, conv, edit(conv))

    return edit_one


def _circular_everywhere(network: nn.Module, draw: Draw) -> None:
    for conv in convolutions(network):
        CONVOLUTION_EDITS["circular"](conv)


def _two_dropouts(network: nn.Module, draw: Draw) -> None:
    for conv in {draw.choice(convolutions(network)), draw.choice(convolutions(network))}:
        replace(network, conv, nn.Sequential(conv, nn.Dropout(0.3)))


def _norms_in_eval(probability: float) -> Callable[[nn.Module, Draw], None]:
    """Norms that stay in eval mode while the rest trains."""

    def edit(network: nn.Module, draw: Draw) -> None:
        for norm in _norms(network):
            if draw.random() < probability:
                norm.train = types.MethodType(lambda self, mode=True: nn.Module.train(self, False), norm)
                norm.eval()

    return edit


def _frozen(network: nn.Module, draw: Draw) -> None:
    for parameter in network.parameters():
        if draw.random() < 0.5:
            parameter.requires_grad_(False)


def _ema(network: nn.Module, draw: Draw) -> None:
    try:
        average = torch.optim.swa_utils.AveragedModel(network)
    except RuntimeError:  # a pruned module cannot be copied
        return
    average.update_parameters(network)
    with torch.no_grad():
        for mine, other in zip(network.parameters(), average.module.parameters(), strict=True):
            mine.copy_(other)


def _channels_last(network: nn.Module, draw: Draw) -> None:
    if not any(isinstance(p, _Tagged) for p in network.parameters()):
        network.to(memory_format=torch.channels_last)


def _extreme_statistics(network: nn.Module, draw: Draw) -> None:
    for norm in _norms(network):
        norm.running_var.mul_(1e-4)


EDITS: dict[str, Callable[[nn.Module, Draw], None]] = {
    **{name: _of_one(edit) for name, edit in (CONVOLUTION_EDITS | QUIET_EDITS).items()},
    "circular everywhere": _circular_everywhere,
    "dropout": _two_dropouts,
    "shared": lambda network, draw: _fit_for_all(network, draw.choice(convolutions(network))),
    "norms in eval": _norms_in_eval(1.0),
    "some norms in eval": _norms_in_eval(0.5),
    "frozen": _frozen,
    "EMA": _ema,
    "channels last": _channels_last,
    "extreme statistics": _extreme_statistics,
}

# --------------------------------------------------------------------------------- hooks, whose calls are compared


class Hook:
    """Records each call, and scales the result if it is to."""

    def __init__(self, log: list[Any], name: str, scales: bool = False) -> None:
        self.log, self.name, self.scales = log, name, scales

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        self.log.append((self.name, [tuple(x.shape) for x in leaves(values)]))
        return pytree.tree_map_only(Tensor, lambda x: 1.5 * x, values[-1]) if self.scales else None


def add_hooks(network: nn.Module, draw: Draw, log: list[Any]) -> None:
    kinds = ["forward", "forward_pre", "full_backward", "full_backward_pre", "scaling"]
    parts = [(name, m) for name, m in network.named_modules() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    for name, part in draw.sample(parts, min(len(parts), draw.randint(1, 3))):
        kind = draw.choice(kinds)
        if kind == "scaling":
            part.register_forward_hook(Hook(log, f"{kind} {name}", True))
        elif name or not kind.startswith("full_backward"):  # a backward hook requires a tensor as result
            getattr(part, f"register_{kind}_hook")(Hook(log, f"{kind} {name}"))


# ------------------------------------------------------------------------------------------ patches of classes


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any = None) -> Iterator[None]:
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value or (lambda *args, **kwargs: 1.25 * original(*args, **kwargs)))
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "Conv2d._conv_forward": lambda: _patched(nn.Conv2d, "_conv_forward", circular),
    "F.conv2d": lambda: _patched(F, "conv2d"),
    "F.interpolate": lambda: _patched(F, "interpolate"),
    "F.batch_norm": lambda: _patched(F, "batch_norm"),
    "Sequential.forward": lambda: _patched(nn.Sequential, "forward"),
    "BatchNorm2d.forward": lambda: _patched(nn.BatchNorm2d, "forward"),
    "Conv2d.forward": lambda: _patched(nn.Conv2d, "forward"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
