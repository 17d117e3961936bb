"""A fused pyramid gives the same as the original, whatever is done to either.

Each case alters a pyramid, fuses it (before or after), and compares results, gradients and buffers over three training
steps, and the calls of every hook.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import random
from typing import Any

import pytest
import torch
from alterations import (
    CONTEXTS,
    EDITS,
    Draw,
    Hook,
    add_hooks,
    convolutions,
    ours_of,
    replace,
)
from fusion_cases import CASES, ONE_EACH, Case, leaves
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from twins import scramble

import fpn_kernels
from fpn_kernels.interop.equivalence import OwnRandomNumbers, roundoff, tolerance
from fpn_kernels.interop.verification import Call, Step, _train, difference_of_steps


@dataclasses.dataclass(frozen=True)
class Alteration:
    """One case.

    Attributes:
        pyramid: the name of a fusion case, or "ours-" and the option of a torchvision case.
        edits: keys of `EDITS`, in order.
        context: the key of `CONTEXTS` under which everything runs.
        dtype: the dtype of parameters and maps.
        hooks: whether hooks are added.
        fuse_first: whether the pyramid is fused before the edits.
        seed: chooses the edited blocks, the hooked modules and all values.
    """

    pyramid: str
    edits: tuple[str, ...] = ()
    context: str = "none"
    dtype: torch.dtype = torch.float32
    hooks: bool = False
    fuse_first: bool = False
    seed: int = 0

    def __str__(self) -> str:
        parts = [self.pyramid, *self.edits, self.context, str(self.dtype).removeprefix("torch.")]
        parts += ["hooks"] * self.hooks + ["fused first"] * self.fuse_first
        return "-".join(part for part in parts if part not in ("none", "float32"))


def _case(name: str) -> Case:
    """The fusion case; this library's module is made from torchvision's."""
    name = name.replace("ours", "torchvision")
    return next(case for case in CASES if case.name == name)


# Without SyncBatchNorm, which trains on GPUs only.
PYRAMIDS = [case.name for case in CASES if case.name != "detectron2-syncbn"]
PYRAMIDS += [name.replace("torchvision", "ours") for name in PYRAMIDS if name.startswith("torchvision")]


def drawn(seed: int) -> Alteration:
    """An alteration by up to three edits."""
    draw = random.Random(seed)
    pyramid = draw.choice(PYRAMIDS)
    context = draw.choice(["none"] * 6 + [*CONTEXTS][1:])
    if pyramid.startswith("effdet") and context == "autocast":
        context = "none"  # the fused nodes return the autocast dtype, eager's resize returns float32 on the CPU
    return Alteration(
        pyramid,
        tuple(draw.sample([*EDITS], draw.randint(0, 3))),
        context,
        draw.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16]),
        draw.random() < 0.5,
        draw.random() < 0.3 and not pyramid.startswith("ours"),
        seed,
    )


def _copies(network: nn.Module, draw: Draw, count: int) -> list[nn.Module]:
    pickles = draw.random() < 0.2
    try:
        return [pickle.loads(pickle.dumps(network)) if pickles else copy.deepcopy(network) for _ in range(count)]
    except (pickle.PicklingError, AttributeError, RuntimeError):  # e.g. a local function or a parametrised module
        return [copy.deepcopy(network) for _ in range(count)]


def _stand_in(network: nn.Module, pyramid: str) -> nn.Module:
    if pyramid.startswith("ours"):
        return ours_of(network)
    with contextlib.suppress(ValueError):  # nothing can be fused: the pyramid stays as it is
        fpn_kernels.fuse(network)
    return network


def _eval_outputs(network: nn.Module, arguments: tuple[Any, ...]) -> Any:
    with torch.no_grad(), OwnRandomNumbers():
        return network.eval()(*pytree.tree_map_only(Tensor, torch.clone, arguments))


def assert_faithful(case: Alteration) -> None:
    """Compare the original with the fused pyramid (or this library's) after the same alteration."""
    draw = random.Random(case.seed)
    torch.manual_seed(case.seed)
    made = _case(case.pyramid)
    network, arguments = made.make(), made.example()
    scramble(network)
    network.train(draw.random() < 0.5)

    def altered(module: nn.Module) -> nn.Module:
        torch.manual_seed(case.seed)
        for edit in case.edits:
            EDITS[edit](module, random.Random(case.seed))
        return module.to(case.dtype)

    # The original, the original that will be changed by one rounding, and the stand-in.
    if case.fuse_first:
        models = _copies(network, draw, 3)
        models = [altered(each) for each in models[:2]] + [altered(_stand_in(models[2], case.pyramid))]
    else:
        try:
            models = _copies(altered(copy.deepcopy(network)), draw, 3)
        except RuntimeError:  # a pruned module cannot be copied
            models = [altered(each) for each in _copies(network, draw, 3)]
        models[2] = _stand_in(models[2], case.pyramid)
    arguments = pytree.tree_map_only(Tensor, lambda x: x.to(case.dtype), arguments)
    if "channels last" in case.edits:
        last = torch.channels_last
        arguments = pytree.tree_map_only(Tensor, lambda x: x.contiguous(memory_format=last), arguments)
    logs: list[list[Any]] = [[], [], []]
    if case.hooks:
        for module, log in zip(models, logs, strict=True):
            add_hooks(module, random.Random(case.seed), log)

    dtypes = {case.dtype, *([torch.bfloat16] if case.context == "autocast" else [])}
    dtypes |= {torch.float32} if case.pyramid.startswith("sam2") else set()  # it resizes in float32
    limit, unit = tolerance(*dtypes), roundoff(*dtypes)
    call = Call(arguments, {}, None)
    steps: list[list[Step] | Exception] = []
    with CONTEXTS[case.context]():
        for module, changed_by in zip(models, (0.0, 2 * unit, 0.0), strict=True):
            try:
                before = _eval_outputs(module, arguments)
                trained = _train(module, type(module), call, changed_by)
                after = _eval_outputs(module, arguments)
                steps.append([Step(before, {}, {}), *trained, Step(after, {}, dict(module.named_buffers()))])
            except Exception as error:
                steps.append(error)
    expected, rounded, actual = steps
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), (case, expected)
        return
    assert not isinstance(actual, Exception), (case, actual)
    assert not isinstance(rounded, Exception)
    assert logs[2] == logs[0], case
    for number, (mine, theirs, near) in enumerate(zip(actual, expected, rounded, strict=True)):
        found = difference_of_steps(mine, theirs, near, limit)
        assert found is None, (case, number, found)


A = Alteration
CHOSEN = [
    # Each dialect, with hooks on some of its modules.
    *(A(case.name, hooks=True, seed=seed) for seed, case in enumerate(ONE_EACH)),
    A("ours-plain", hooks=True, seed=7),
    # Each alteration of a block, before fusing or after.
    A("torchvision-bn", ("circular",), fuse_first=True),  # seed 0 chooses a 3x3 convolution
    A("ours-frozen-bn", ("circular everywhere",)),
    A("detectron2-avg", ("patched forward",), seed=1),
    A("ours-plain", ("own __call__",), seed=2),
    A("torchvision-plain", ("quiet subclass", "plain tensors"), seed=1),
    A("torchvision-pool", ("tagged weight",), seed=3),
    A("mmdet-bn", ("spectral norm",), seed=2),
    A("ours-gn", ("weight norm",), hooks=True, seed=1),
    A("torchvision-frozen-bn", ("pruned", "frozen"), fuse_first=True, seed=4),
    A("sam2-published", ("adapter",), fuse_first=True),
    A("torchvision-p6p7-from-p5", ("checkpointed",), seed=2),
    A("effdet-bn", ("activated after", "spectral norm"), seed=1),
    # In-place changes of a map, random numbers and statistics show the order and the number of calls.
    A("torchvision-plain", ("activated before",), seed=5),
    A("ours-bn", ("activated before", "dropout"), seed=3),
    A("named-single-file", ("activated before",), seed=1),
    A("mmdet-on-lateral", ("activated before", "dropout"), seed=3),
    A("detectron2-bn", ("dropout",), hooks=True, seed=4),
    A("sam2-bilinear-avg", ("counting norm", "activated before"), seed=1),
    A("torchvision-plain", ("shared",), seed=2),
    A("ours-plain", ("shared", "dropout"), seed=1),
    # Norms and parameters in mixed states.
    A("torchvision-bn", ("norms in eval", "frozen"), seed=6),
    A("detectron2-bn", ("some norms in eval", "EMA"), fuse_first=True, seed=2),
    A("effdet-bn", ("EMA", "norms in eval")),
    A("torchvision-bn", ("norms in eval", "extreme statistics"), dtype=torch.bfloat16, seed=6),
    A("ours-frozen-bn", ("channels last", "extreme statistics"), seed=4),
    A("mmdet-activation", ("channels last", "counting norm"), dtype=torch.float64, seed=5),
    # A class or function of PyTorch that is patched after the import, and autocast.
    A("ours-plain", context="Conv2d._conv_forward"),
    A("torchvision-plain", context="F.conv2d", seed=1),
    A("sam2-published", context="F.interpolate", seed=2),
    A("ours-frozen-bn", context="F.batch_norm", seed=6),
    A("mmdet-pool", context="Sequential.forward", seed=1),
    A("detectron2-bn", ("norms in eval",), context="BatchNorm2d.forward", seed=3),
    A("torchvision-plain", context="Conv2d.forward", fuse_first=True, seed=2),
    A("mmdet-bn", context="autocast", seed=2),
    A("ours-plain", ("counting norm",), context="autocast", seed=5),
]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen_alterations(case: Alteration) -> None:
    assert_faithful(case)


def test_the_table_has_all_alterations() -> None:
    assert {edit for case in CHOSEN for edit in case.edits} == set(EDITS)
    assert {case.context for case in CHOSEN} == set(CONTEXTS)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(500))
def test_drawn_alterations(seed: int) -> None:
    assert_faithful(drawn(seed))


@pytest.mark.parametrize("inplace", [False, True], ids=["plain", "inplace"])
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_every_block_is_called_in_the_originals_order(case: Case, inplace: bool) -> None:
    twin = case.make().eval()
    if inplace:  # it changes the map that the next level reads, or has read
        for conv in convolutions(twin):
            replace(twin, conv, nn.Sequential(nn.ReLU(inplace=True), conv))
    network, logs = fpn_kernels.fuse(copy.deepcopy(twin)), ([], [])
    for model, log in zip((network, twin), logs, strict=True):
        for name, part in model.named_modules():
            part.register_forward_hook(Hook(log, name))
    example = case.example()
    with torch.no_grad():
        actual, expected = (model(*copy.deepcopy(example)) for model in (network, twin))
    assert logs[0] == logs[1] and len(logs[0]) > 8
    for got, want in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
