"""A stand-in is faithful: whatever is done to the eager pyramid, the fused one gives the same.

Each case alters a pyramid in up to three ways that its seed draws, fuses a copy (before or after), and compares
results, gradients and buffers over three steps of training, and the calls of every hook.  `python -m pytest
"tests/test_faithful.py::test_altered_pyramids[17]"` repeats one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import pickle
import random
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import detectron2_twin, effdet_twin, mmdet_twin, sam2_twin, torchvision_twin
from fusion_cases import ONE_EACH, leaves
from resnet_twins import NamedLayersFPN, single_file_fpn
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.utils import parametrizations, prune
from twins import scramble

import fpn_kernels
from fpn_kernels.backends import selection
from fpn_kernels.interop.comparison import roundoff, tolerance
from fpn_kernels.interop.randomness import OwnRandomNumbers
from fpn_kernels.interop.swapping import is_fused
from fpn_kernels.interop.verification import Call, Step, _train, difference_of_steps
from fpn_kernels.modules import FeaturePyramidNetwork, FrozenBatchNorm2d

CHANNELS, WIDTH = [3, 4, 5], 4
SIZES = [(12, 16), (6, 8), (3, 4)]

Blocks = list[tuple[nn.Module, str]]


# ------------------------------------------------------------------------------------------------ pyramids


def _features(draw: random.Random) -> list[Tensor]:
    return [torch.randn(2, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]


def _named(draw: random.Random) -> tuple[Any, ...]:
    return (OrderedDict((str(n), x) for n, x in enumerate(_features(draw))),)


NORMS: dict[str, Any] = {
    "none": None,
    "bn": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
    "gn": lambda channels: nn.GroupNorm(2, channels),
}


def _torchvision(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    extra = draw.choice([None, torchvision_twin.LastLevelMaxPool(), torchvision_twin.LastLevelP6P7(WIDTH, WIDTH)])
    network = torchvision_twin.FeaturePyramidNetwork(CHANNELS, WIDTH, extra, NORMS[draw.choice([*NORMS])])
    return network, _named(draw)


class BottomUp(nn.Module):
    """Maps of the sizes that the others have, from an image."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, c, 1) for c in CHANNELS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"res{n + 2}": conv(x[:, :, :: 2**n, :: 2**n]) for n, conv in enumerate(self.convolutions)}


def _detectron2(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    norm, fuse_type = NORMS[draw.choice([*NORMS])], draw.choice(["sum", "avg"])
    names = ["res2", "res3", "res4"]
    network = detectron2_twin.FPN(BottomUp(), names, CHANNELS, WIDTH, norm, fuse_type=fuse_type)
    return network, (torch.randn(2, 3, 12, 16),)


def _mmdet(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    extra = draw.choice([False, "on_input", "on_lateral", "on_output"])
    act = draw.choice([None, None, lambda: nn.ReLU(inplace=True)])
    # A GroupNorm of its names has four groups: WIDTH channels fit.
    norm = draw.choice([None, "BN", "GN"])
    network = mmdet_twin.FPN(CHANNELS, WIDTH, 4, add_extra_convs=extra, norm=norm, act=act)
    return network, (tuple(_features(draw)),)


def _sam2(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    mode, fuse_type = draw.choice(["nearest", "bilinear"]), draw.choice(["sum", "avg"])
    options = {"fpn_interp_model": mode, "fuse_type": fuse_type, "fpn_top_down_levels": draw.choice([None, [0, 1]])}
    network = sam2_twin.FpnNeck(sam2_twin.PositionEncoding(), WIDTH, CHANNELS[::-1], **options)
    return network, (_features(draw),)


def _effdet(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    norm, by = draw.random() < 0.5, draw.choice(["size", "scale"])
    return effdet_twin.BiFpnLayer(CHANNELS, WIDTH, SIZES, norm=norm, by=by), (_features(draw),)


def _named_layers(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    return single_file_fpn([1, 1, 1, 1], 1), (torch.randn(2, 3, 64, 96),)


def _ours(draw: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    """Compared with torchvision's: `_stand_in` makes ours of it."""
    return _torchvision(draw)


PYRAMIDS = [_torchvision, _torchvision, _ours, _ours, _detectron2, _mmdet, _sam2, _effdet, _named_layers]


# ----------------------------------------------------------------------------------------------- alterations


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of the pyramid itself, not those of a backbone in it."""
    outside = ("bottom_up", "conv1", "layer1", "layer2", "layer3", "layer4")
    found = [m for name, m in network.named_modules() if not name.startswith(outside) and isinstance(m, nn.Conv2d)]
    return list(dict.fromkeys(found))


def _one(network: nn.Module, draw: random.Random) -> nn.Conv2d:
    return draw.choice(_convolutions(network))


def _norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if hasattr(m, "running_mean")]


def _place(network: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module is registered."""
    return [(p, name) for p in network.modules() for name, child in p._modules.items() if child is module]


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    inside = set(new.modules())
    for parent, name in _place(network, old):
        if parent not in inside:
            parent._modules[name] = new
    for lists in ("lateral_convs", "output_convs"):  # Detectron2's class reads these
        listed = network.__dict__.get(lists)
        if isinstance(listed, list):
            listed[:] = [new if module is old else module for module in listed]


def _circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    p = self.padding[0]
    return F.conv2d(F.pad(x, (p, p, p, p), mode="circular"), weight, bias, self.stride)


def _twice(self: nn.Conv2d, x: Tensor) -> Tensor:
    return 2 * type(self).forward(self, x)


class Subclass(nn.Conv2d):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


class QuietSubclass(nn.Conv2d):
    """Changes nothing."""


class Tagged(Tensor):
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
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.in_channels, self.out_channels = base, base.in_channels, base.out_channels
        self.low_rank = nn.Conv2d(base.in_channels, base.out_channels, 1, stride=base.stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low_rank(x)


def circular_instance(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    conv._conv_forward = types.MethodType(_circular, conv)


def circular_everywhere(network: nn.Module, draw: random.Random) -> None:
    for conv in _convolutions(network):
        conv._conv_forward = types.MethodType(_circular, conv)


def patched_forward(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    conv.forward = types.MethodType(_twice, conv)


def own_call(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    if type(conv) is nn.Conv2d:
        conv.__class__ = Subclass


def quiet_subclass(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    if type(conv) is nn.Conv2d:
        conv.__class__ = QuietSubclass


def tagged_weight(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    if type(conv) is nn.Conv2d and "weight" in conv._parameters:
        weight = conv.weight.detach()
        conv.weight = nn.Parameter(weight.as_subclass(Tagged), requires_grad=False)


def spectral(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    if "weight" in conv._parameters and type(conv.weight) is nn.Parameter:
        parametrizations.spectral_norm(conv)


def weight_norm(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    if "weight" in conv._parameters and type(conv.weight) is nn.Parameter:
        parametrizations.weight_norm(conv)


def pruned(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    if "weight" in conv._parameters and type(conv.weight) is nn.Parameter:
        prune.l1_unstructured(conv, "weight", amount=0.5)


def adapter(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    _replace(network, conv, LowRank(conv))


def checkpointed(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    _replace(network, conv, CheckpointWrapper(conv))


def activated_before(network: nn.Module, draw: random.Random) -> None:
    """An in-place activation in front of the convolution, which changes the map that the convolution is given."""
    conv = _one(network, draw)
    _replace(network, conv, nn.Sequential(nn.ReLU(inplace=True), conv))


def activated_after(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    _replace(network, conv, nn.Sequential(conv, nn.ReLU(inplace=True)))


def dropout(network: nn.Module, draw: random.Random) -> None:
    for conv in {_one(network, draw), _one(network, draw)}:
        _replace(network, conv, nn.Sequential(conv, nn.Dropout(0.3)))


def counting_norm(network: nn.Module, draw: random.Random) -> None:
    conv = _one(network, draw)
    _replace(network, conv, nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))


def shared(network: nn.Module, draw: random.Random) -> None:
    """One block for all levels that it fits."""
    first = _one(network, draw)
    block = nn.Sequential(nn.ReLU(inplace=True), first, nn.BatchNorm2d(first.out_channels))
    for conv in _convolutions(network):
        if (conv.in_channels, conv.kernel_size, conv.stride) == (first.in_channels, first.kernel_size, first.stride):
            _replace(network, conv, block)


def eval_norms(network: nn.Module, draw: random.Random) -> None:
    """Norms that stay in eval mode while the rest trains."""
    for norm in _norms(network):
        norm.train = types.MethodType(lambda self, mode=True: nn.Module.train(self, False), norm)
        norm.eval()


def some_eval(network: nn.Module, draw: random.Random) -> None:
    for norm in _norms(network):
        if draw.random() < 0.5:
            norm.train = types.MethodType(lambda self, mode=True: nn.Module.train(self, False), norm)


def frozen(network: nn.Module, draw: random.Random) -> None:
    for parameter in network.parameters():
        if draw.random() < 0.5:
            parameter.requires_grad_(False)


def ema(network: nn.Module, draw: random.Random) -> None:
    try:
        average = torch.optim.swa_utils.AveragedModel(network)
    except RuntimeError:  # a pruned module cannot be copied
        return
    average.update_parameters(network)
    with torch.no_grad():
        for mine, other in zip(network.parameters(), average.module.parameters(), strict=True):
            mine.copy_(other)


def channels_last(network: nn.Module, draw: random.Random) -> None:
    # Not the network of one channel: PyTorch's own convolution ends the process there (2.13, CPU).
    if not isinstance(network, NamedLayersFPN) and not any(isinstance(p, Tagged) for p in network.parameters()):
        network.to(memory_format=torch.channels_last)


def plain_tensors(network: nn.Module, draw: random.Random) -> None:
    """What `nn.DataParallel` makes of a replica: tensors in the place of parameters."""
    conv = _one(network, draw)
    if "weight" in conv._parameters and not conv._forward_pre_hooks and type(conv.weight) is nn.Parameter:
        weight = conv._parameters.pop("weight").detach()
        conv.weight = weight


def extreme_statistics(network: nn.Module, draw: random.Random) -> None:
    for norm in _norms(network):
        norm.running_var.mul_(1e-4)


EDITS: list[Callable[[nn.Module, random.Random], None]] = [
    circular_instance,
    circular_everywhere,
    patched_forward,
    own_call,
    quiet_subclass,
    tagged_weight,
    spectral,
    weight_norm,
    pruned,
    adapter,
    checkpointed,
    activated_before,
    activated_after,
    dropout,
    counting_norm,
    shared,
    eval_norms,
    some_eval,
    frozen,
    ema,
    channels_last,
    plain_tensors,
    extreme_statistics,
]


# ----------------------------------------------------------------------------- hooks, whose calls are compared


class Hook:
    """Takes down each call of it; changes what it is given, if at all, in the same way."""

    def __init__(self, log: list[Any], name: str, changes: bool) -> None:
        self.log, self.name, self.changes = log, name, changes

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        self.log.append((self.name, [tuple(x.shape) for x in leaves(values)]))
        return None


class Scaling(Hook):
    """A forward hook that changes the result."""

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        super().__call__(module, *values)
        return torch.utils._pytree.tree_map_only(Tensor, lambda x: 1.5 * x, values[-1])


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre", "scaling"]


def add_hooks(network: nn.Module, draw: random.Random, log: list[Any]) -> None:
    parts = [(name, m) for name, m in network.named_modules() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    for name, part in draw.sample(parts, min(len(parts), draw.randint(1, 3))):
        kind = draw.choice(HOOKS)
        if kind == "scaling":
            part.register_forward_hook(Scaling(log, f"{kind} {name}", True))
        elif name or not kind.startswith("full_backward"):  # of a tensor's result, not of a dict's
            getattr(part, f"register_{kind}_hook")(Hook(log, f"{kind} {name}", False))


# ------------------------------------------------------------------------------------------ patches of classes


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextlib.contextmanager
def _patched_class() -> Iterator[None]:
    """The tiling patch on the class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", _circular)
        yield


@contextlib.contextmanager
def _patched_function(name: str) -> Iterator[None]:
    original = getattr(F, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, name, lambda *args, **kwargs: 1.25 * original(*args, **kwargs))
        yield


@contextlib.contextmanager
def _patched_method(cls: type, name: str) -> Iterator[None]:
    original = getattr(cls, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, name, lambda self, *args: 1.25 * original(self, *args))
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": _nothing,
    "Conv2d._conv_forward": _patched_class,
    "F.conv2d": lambda: _patched_function("conv2d"),
    "F.interpolate": lambda: _patched_function("interpolate"),
    "F.batch_norm": lambda: _patched_function("batch_norm"),
    "Sequential.forward": lambda: _patched_method(nn.Sequential, "forward"),
    "BatchNorm2d.forward": lambda: _patched_method(nn.BatchNorm2d, "forward"),
    "Conv2d.forward": lambda: _patched_method(nn.Conv2d, "forward"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


# ----------------------------------------------------------------------------------------------- the comparison


def _ours_of(network: nn.Module) -> nn.Module:
    """Our module with the parts of torchvision's."""
    ours = FeaturePyramidNetwork(CHANNELS, WIDTH)
    for name in ("inner_blocks", "layer_blocks", "extra_blocks"):
        setattr(ours, name, getattr(network, name))
    return ours.train(network.training)


def _copies(network: nn.Module, draw: random.Random, count: int) -> list[nn.Module]:
    pickles = draw.random() < 0.2
    try:
        return [pickle.loads(pickle.dumps(network)) if pickles else copy.deepcopy(network) for _ in range(count)]
    except (pickle.PicklingError, AttributeError, RuntimeError):  # nor can a function of a test, a parametrised module
        return [copy.deepcopy(network) for _ in range(count)]


def _stand_in(network: nn.Module, make: Any) -> nn.Module:
    if make is _ours:
        return _ours_of(network)
    with contextlib.suppress(ValueError):  # nothing that could be fused: left alone
        fpn_kernels.fuse(network)
    return network


def _eval_outputs(network: nn.Module, arguments: tuple[Any, ...]) -> Any:
    with torch.no_grad(), OwnRandomNumbers():
        return network.eval()(*torch.utils._pytree.tree_map_only(Tensor, torch.clone, arguments))


def _case(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    make = draw.choice(PYRAMIDS)
    network, arguments = make(draw)
    scramble(network)
    network.train(draw.random() < 0.5)
    edits = draw.sample(EDITS, draw.randint(0, 3))
    fuse_first = draw.random() < 0.3 and make is not _ours
    dtype = draw.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16])
    context = draw.choice(["none"] * 6 + [*CONTEXTS][1:])
    if (make, context) == (_effdet, "autocast"):
        context = "none"  # its nodes are of the autocast dtype, as the promise is; eager's resize is float32 on the CPU
    hook_seed = draw.randrange(2**32) if draw.random() < 0.5 else None
    described = [make.__name__, [e.__name__ for e in edits], str(dtype), context, hook_seed is not None, fuse_first]

    def altered(module: nn.Module, change_seed: int = seed) -> nn.Module:
        torch.manual_seed(change_seed)
        for edit in edits:
            edit(module, random.Random(change_seed))
        return module.to(dtype)

    # One per run: the original, the original changed by one rounding, and what is faithful to it.
    if fuse_first:
        originals = _copies(network, draw, 3)
        originals = [altered(each) for each in originals[:2]] + [altered(_stand_in(originals[2], make))]
    else:
        try:
            originals = _copies(altered(copy.deepcopy(network)), draw, 3)
        except RuntimeError:  # a pruned module cannot be copied
            originals = [altered(each) for each in _copies(network, draw, 3)]
        originals[2] = _stand_in(originals[2], make)
    arguments = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(dtype), arguments)
    if "channels_last" in described[1]:
        arguments = torch.utils._pytree.tree_map_only(
            Tensor, lambda x: x.contiguous(memory_format=torch.channels_last), arguments
        )
    logs: list[list[Any]] = [[], [], []]
    if hook_seed is not None:
        for module, log in zip(originals, logs, strict=True):
            add_hooks(module, random.Random(hook_seed), log)

    dtypes = {dtype, *([torch.bfloat16] if context == "autocast" else [])}
    dtypes |= {torch.float32} if make is _sam2 else set()  # in which it resizes whatever it is given
    limit, unit = tolerance(*dtypes), roundoff(*dtypes)
    call = Call(arguments, {}, None)
    steps: list[list[Step] | Exception] = []
    with CONTEXTS[context]():
        for module, changed_by in zip(originals, (0.0, 2 * unit, 0.0), strict=True):
            try:
                before = _eval_outputs(module, arguments)
                trained = _train(module, type(module), call, changed_by)
                after = _eval_outputs(module, arguments)
                steps.append([Step(before, {}, {}), *trained, Step(after, {}, dict(module.named_buffers()))])
            except Exception as error:
                steps.append(error)
    expected, rounded, actual = steps
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), (described, expected)
        return
    assert not isinstance(actual, Exception), (described, actual)
    assert not isinstance(rounded, Exception)
    assert logs[2] == logs[0], (described, logs[0], logs[2])
    for number, (mine, theirs, near) in enumerate(zip(actual, expected, rounded, strict=True)):
        found = difference_of_steps(mine, theirs, near, limit)
        assert found is None, (described, number, found)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("seed", range(500))
def test_altered_pyramids(seed: int) -> None:
    _case(seed)


# ------------------------------------------------------------------------------------------- what cannot be drawn


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_block_is_called_in_the_originals_order(case: Any, inplace: bool) -> None:
    twin = case.make().eval()
    if inplace:  # which changes the map that the next level reads, or has read
        for conv in _convolutions(twin):
            _replace(twin, conv, nn.Sequential(nn.ReLU(inplace=True), conv))
    network, logs = fpn_kernels.fuse(copy.deepcopy(twin)), ([], [])
    for model, log in zip((network, twin), logs, strict=True):
        for name, part in model.named_modules():
            part.register_forward_hook(Hook(log, name, False))
    example = case.example()
    with torch.no_grad():
        results = [model(*copy.deepcopy(example)) for model in (network, twin)]
    assert logs[0] == logs[1] and len(logs[0]) > 8
    _assert_equal(*results)


def _pair(norm: Any = None, cls: type[nn.Module] = torchvision_twin.FeaturePyramidNetwork) -> tuple[Any, Any]:
    twin = cls(CHANNELS, WIDTH, None, norm)
    scramble(twin)
    return copy.deepcopy(twin).eval(), twin.eval()


def _stand_ins(norm: Any = None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A fused module and ours, each beside torchvision's with the same parameters."""
    network, twin = _pair(norm)
    yield fpn_kernels.fuse(network), twin
    yield _ours_of(copy.deepcopy(twin)).eval(), twin


def _assert_equal(actual: Any, expected: Any) -> None:
    for got, want in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def _maps() -> OrderedDict[str, Tensor]:
    return OrderedDict(
        (str(n), torch.randn(2, c, *size)) for n, (c, size) in enumerate(zip(CHANNELS, SIZES, strict=True))
    )


def test_transforms_and_forward_mode_see_the_original() -> None:
    for network, twin in _stand_ins():
        x, tangents = _maps(), _maps()
        both = (Listed(network), Listed(twin))
        _assert_equal(*(torch.func.jvp(f, tuple(x.values()), tuple(tangents.values())) for f in both))
        stacked = [torch.stack([m, 2 * m]) for m in x.values()]
        _assert_equal(*(torch.vmap(f)(*stacked) for f in both))


def _of(maps: Any) -> OrderedDict[str, Tensor]:
    return OrderedDict((str(n), m) for n, m in enumerate(maps))


class Image(nn.Module):
    """Three maps of an image, by name, for a pyramid."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.body, self.fpn = nn.ModuleList(nn.Conv2d(3, c, 1, 2**n) for n, c in enumerate(CHANNELS)), fpn

    def forward(self, x: Tensor) -> Any:
        return self.fpn({str(n): conv(x) for n, conv in enumerate(self.body)})


def test_symbolic_traces_are_of_the_modules() -> None:
    graphs = []
    for network, twin in _stand_ins(nn.BatchNorm2d):
        torch.manual_seed(0)
        model = Image(network).eval()
        traced = torch.fx.symbolic_trace(model)
        x = torch.randn(2, 3, 13, 17)
        model.fpn = twin
        _assert_equal(traced(x), model(x))
        graphs.append([str(node.target) for node in traced.graph.nodes if node.op == "call_module"])
    assert graphs[0] == graphs[1] and "fpn.inner_blocks.2.0" in graphs[0] and "fpn.layer_blocks.0.1" in graphs[0]


def test_a_backbone_with_its_pyramid_is_traced_symbolically() -> None:
    model = fpn_kernels.ResNetFPN((1, 1, 1, 1), 4, width=4).eval()
    x = torch.randn(1, 3, 40, 56)
    _assert_equal(torch.fx.symbolic_trace(model)(x), model(x))


class Listed(nn.Module):
    """A pyramid of maps without names."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.fpn = fpn

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.fpn(_of(maps)).values())


def test_torch_jit_traces_run_without_this_library() -> None:
    for network, twin in _stand_ins():
        traced = torch.jit.trace(Listed(network), tuple(_maps().values()))
        assert "fpn_kernels::" not in str(traced.inlined_graph)
        x = _maps()
        _assert_equal(traced(*x.values()), tuple(twin(x).values()))


@pytest.mark.parametrize(
    "make", [lambda: FeaturePyramidNetwork([4], 4), lambda: fpn_kernels.ResNetFPN((1, 1, 1, 1), 4, width=4)]
)
def test_torch_jit_script_names_a_cure(make: Any) -> None:
    with pytest.raises(
        TypeError, match=r"torch.jit.script cannot compile .*torch.jit.trace, or load its state_dict into"
    ):
        torch.jit.script(nn.Sequential(make()))


class Negated(torchvision_twin.FeaturePyramidNetwork):
    def get_result_from_layer_blocks(self, x: Tensor, idx: int) -> Tensor:
        return -super().get_result_from_layer_blocks(x, idx)


class OursNegated(FeaturePyramidNetwork):
    def get_result_from_layer_blocks(self, x: Tensor, idx: int) -> Tensor:
        return -super().get_result_from_layer_blocks(x, idx)


def test_methods_that_a_subclass_overrides() -> None:
    twin, _ = _pair(cls=Negated)
    with pytest.raises(ValueError, match="Negated has a get_result_from_layer_blocks of its own, which the forward of"):
        fpn_kernels.fuse(twin)
    ours = OursNegated(CHANNELS, WIDTH)
    ours.load_state_dict(twin.state_dict())
    _assert_equal(ours(x := _maps()), twin(x))


_METHODS = pytest.mark.parametrize("name", ["get_result_from_inner_blocks", "get_result_from_layer_blocks"])


def _doubling(cls: type, name: str) -> Callable[..., Tensor]:
    original = getattr(cls, name)
    return lambda self, x, idx: 2 * original(self, x, idx)


@_METHODS
def test_methods_patched_onto_the_instance_after_fusing(name: str) -> None:
    for network, twin in _stand_ins():
        for model in (network, twin):
            setattr(model, name, types.MethodType(_doubling(type(model), name), model))
        _assert_equal(network(x := _maps()), twin(x))


@_METHODS
def test_methods_patched_onto_the_class_after_fusing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = list(_stand_ins())
    for cls in (torchvision_twin.FeaturePyramidNetwork, FeaturePyramidNetwork):
        monkeypatch.setattr(cls, name, _doubling(cls, name))
    for network, twin in pairs:
        _assert_equal(network(x := _maps()), twin(x))


def test_a_forward_patched_onto_the_class_after_fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, twin = _pair()
    fpn_kernels.fuse(network)
    original = type(twin).forward
    monkeypatch.setattr(type(twin), "forward", lambda self, x: {n: 2 * p for n, p in original(self, x).items()})
    _assert_equal(network(x := _maps()), twin(x))
    with pytest.raises(ValueError, match="the forward of FeaturePyramidNetwork was decorated or replaced"):
        fpn_kernels.fuse(twin)


def test_wrappers_that_pass_attributes_on_are_no_pyramids() -> None:
    model = nn.ModuleDict({"fpn": CheckpointWrapper(single_file_fpn([1, 1, 1, 1], 1))})
    _, report = fpn_kernels.fuse(model, report=True)
    assert list(report.fused) == ["fpn._checkpoint_wrapped_module"] and not is_fused(model["fpn"])
    network, _ = _pair()
    _, report = fpn_kernels.fuse(torch.compile(network, backend="eager"), report=True)
    assert list(report.fused) == ["_orig_mod"]


def test_arguments_that_the_dialect_does_not_know_are_the_originals() -> None:
    network, twin = _pair()
    fpn_kernels.fuse(network)
    _assert_equal(network(x=(x := _maps())), twin(x))
    for model in (network, twin):
        with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
            model(x, masks=None)


# ---------------------------------------------------------------------------------------------- nothing global


def test_the_generators_do_not_move() -> None:
    network = torchvision_twin.FeaturePyramidNetwork(CHANNELS, WIDTH)
    network.layer_blocks[1].append(nn.Dropout(0.5))
    x, state = _maps(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:  # another thread would see this
        patch.setattr(torch, "manual_seed", _never)
        patch.setattr(torch, "set_rng_state", _never)
        fpn_kernels.fuse(network, verify=x)
    assert is_fused(network) and torch.equal(torch.get_rng_state(), state)


def _never(*args: Any) -> None:
    raise AssertionError("a generator of the user's was set")


def test_two_runs_draw_the_same_and_the_operators_keep_their_meaning() -> None:
    def draw() -> list[Tensor]:
        x = torch.ones(4000)
        values = [F.dropout(x, 0.25), torch.native_dropout(x, 0.25, True)[0], torch.rand(4000), torch.rand_like(x)]
        values += [torch.randn(4000), torch.randn_like(x), torch.bernoulli(0.5 * x), torch.randperm(4000).float()]
        values += [x.clone().uniform_(), x.clone().normal_(), torch.randint(0, 2, (4000,)).float()]
        return [*values, F.alpha_dropout(x, 0.25, True), F.dropout2d(x.view(1, 4000, 1, 1), 0.25).flatten()]

    state = torch.get_rng_state()
    with OwnRandomNumbers():
        first = draw()
    with OwnRandomNumbers():
        second = draw()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    plain = draw()
    for one, other, usual in zip(first, second, plain, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, usual)
        torch.testing.assert_close(one.mean(), usual.mean(), rtol=0, atol=0.1)
        torch.testing.assert_close(one.std(), usual.std(), rtol=0.1, atol=0.05)


def test_threads_that_fuse_leave_nothing_and_disturb_nobody() -> None:
    cls = type("FeaturePyramidNetwork", (torchvision_twin.FeaturePyramidNetwork,), {})
    networks = [cls(CHANNELS, WIDTH) for _ in range(8)]
    served: list[set[str]] = []

    def fuse(network: nn.Module) -> None:
        fpn_kernels.fuse(network, verify=_maps())

    def compute(event: threading.Event) -> None:
        top, lateral = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 16, 16)
        while not event.is_set():
            served.append({selection.forced_by()[0] or "free"})
            fpn_kernels.upsample_add(top, lateral)

    done = threading.Event()
    other = threading.Thread(target=compute, args=(done,))
    other.start()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(fuse, networks))
    done.set()
    other.join()
    assert len({type(network) for network in networks}) == 1 and all(map(is_fused, networks))
    assert set().union(*served) == {"free"} and selection.forced_by()[0] is None


def test_blocks_of_use_backend_may_overlap() -> None:
    first = fpn_kernels.use_backend("eager")
    first.__enter__()
    second = fpn_kernels.use_backend("eager")
    second.__enter__()
    first.__exit__(None, None, None)
    assert selection.forced_by()[0] == "eager"
    second.__exit__(None, None, None)
    assert selection.forced_by()[0] is None
    for _ in range(100):
        fpn_kernels.use_backend("eager")
    with fpn_kernels.use_backend(None):
        assert selection.forced_by()[0] is None
    assert selection.forced_by()[0] == "eager" and len(selection._requests) <= 2
    fpn_kernels.use_backend(None)
    assert selection.forced_by()[0] is None
