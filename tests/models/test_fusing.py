"""Blocks that `FeaturePyramidNetwork` computes by fused calls, and blocks that it calls as modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alterations import CONVOLUTION_EDITS, QUIET_EDITS
from oracle import error, rounding
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from twins import assert_same, convolved, group_norm, maps, pair, served

from fpn_kernels.modules import FrozenBatchNorm2d
from fpn_kernels.modules.batch_norm import fold, has_fixed_statistics
from fpn_kernels.operators.dispatch import use_backend

FUSED, MERGED = "lateral_connection", "upsample_add"
ALL_FUSED = [FUSED] * 4
LEVEL_1_MERGED = [FUSED, FUSED, MERGED, FUSED]

# ------------------------------------------------------------------------------------------------- norms


class ActivatedBatchNorm2d(nn.BatchNorm2d):
    """A norm with the tensors of BatchNorm and another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _with_tensors_of_batch_norm(class_name: str, forward: Callable[..., Tensor]) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        forward.__qualname__, forward.__module__ = f"{class_name}.forward", __name__
        norm = type(class_name, (nn.Module,), {"forward": forward, "__module__": __name__})()
        norm.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            norm.register_buffer(name, torch.ones(channels))
        return norm

    return make


# Another library's frozen BatchNorm, and the same tensors under another name with an activation (as in inplace_abn).
detectron2_like = _with_tensors_of_batch_norm(
    "FrozenBatchNorm2d",
    lambda self, x: nn.functional.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
    ),
)
inplace_abn = _with_tensors_of_batch_norm("InPlaceABN", lambda self, x: (x - 1).relu())


def frozen_with_activation(channels: int) -> nn.Module:
    return type("Activated", (FrozenBatchNorm2d,), {"forward": lambda self, x: x.relu()})(channels)


@pytest.mark.parametrize(
    ("norm_layer", "is_folded"),
    [
        (nn.BatchNorm2d, True),
        (nn.SyncBatchNorm, True),
        (FrozenBatchNorm2d, True),
        (detectron2_like, True),
        (lambda c: nn.BatchNorm2d(c, affine=False), True),
        (lambda c: nn.BatchNorm2d(c, eps=1e-2), True),
        (lambda c: nn.BatchNorm2d(c, track_running_stats=False), False),
        (group_norm, False),
        (nn.InstanceNorm2d, False),
        (ActivatedBatchNorm2d, False),
        (inplace_abn, False),
        (frozen_with_activation, False),
    ],
    ids=["bn", "sync", "frozen", "d2", "no-affine", "eps", "no-stats", "gn", "in", "bn-relu", "abn", "frozen-relu"],
)
def test_norms_that_are_folded_and_norms_that_are_not(norm_layer: Any, is_folded: bool) -> None:
    network, twin = pair(norm_layer)
    x = maps()
    with torch.no_grad():
        calls = served(lambda: assert_same(network(x), twin(x)))
    assert calls == (ALL_FUSED if is_folded else [MERGED] * 3)


def test_batch_norm_in_training_is_run_and_eval_afterwards_sees_its_statistics() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    network(x)  # a cached fold would show below
    network.train(), twin.train()
    assert served(lambda: network(x)) == [MERGED] * 3
    twin(x)
    network.eval(), twin.eval()
    assert served(lambda: assert_same(network(x), twin(x))) == ALL_FUSED


def test_nothing_is_cached_across_an_optimiser_step_or_an_edit() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    for model in (network, twin):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        sum(p.square().mean() for p in model(x).values()).backward()
        optimiser.step()
        model.inner_blocks[2][1].running_mean.add_(1.0)
        model.layer_blocks[1][1].eps = 0.1
    assert_same(network(x), twin(x))


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, FrozenBatchNorm2d, detectron2_like], ids=["bn", "frozen", "d2"])
@pytest.mark.parametrize("kind", ["float16", "float32 norms", "autocast"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_fold_that_would_overflow_is_finite(norm_layer: Any, kind: str, grad: bool) -> None:
    """A mean of 250 divided by sqrt(eps) overflows float16."""
    network, twin = pair(norm_layer)
    for model in (network, twin):
        model.half() if kind != "autocast" else None
        for norm in (m for m in model.modules() if hasattr(m, "running_var")):
            norm.running_mean.fill_(250.0), norm.running_var.zero_()
            norm.weight.data.fill_(0.1), norm.bias.data.zero_()
            norm.float() if kind == "float32 norms" else None
    x = maps(dtype=torch.float32 if kind == "autocast" else torch.float16, grad=grad)
    with torch.autocast("cpu", torch.float16, enabled=kind == "autocast"):
        actual, expected = network(x), twin(x)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and value.isfinite().all() == actual[name].isfinite().all()
        # In the 3x3 convolutions, 12 times 9 products near 8000 cancel.
        torch.testing.assert_close(actual[name].float(), value.float(), rtol=2e-2, atol=64.0, equal_nan=True)


def test_no_norm_is_folded_in_16_bits() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert served(lambda: network(x)) == [MERGED] * 3
    network.bfloat16(), twin.bfloat16()
    x = maps(dtype=torch.bfloat16)
    with torch.no_grad(), use_backend("eager"):
        assert served(lambda: assert_same(network(x), twin(x))) == [MERGED] * 3


def test_fold_is_the_composition_in_float64() -> None:
    conv, norm = nn.Conv2d(5, 7, 1).double(), nn.BatchNorm2d(7).double().eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    assert has_fixed_statistics(norm)
    weight, bias = fold(conv.weight, conv.bias, norm)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_batch_norm_is_the_same_with_and_without_gradients(dtype: torch.dtype) -> None:
    norm = FrozenBatchNorm2d(6)
    assert {name: value.unique().tolist() for name, value in norm.state_dict().items()} == {
        "weight": [1.0],
        "bias": [0.0],
        "running_mean": [0.0],
        "running_var": [1.0],
    }
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0), norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(2, 6, 4, 5, dtype=dtype)
    exact = copy.deepcopy(norm).double()(x.double())
    plain, tracked = norm(x), norm(x.clone().requires_grad_())
    assert plain.dtype == tracked.dtype == dtype and tracked.requires_grad
    for result in (plain, tracked):
        assert error(result.detach(), exact) <= 3 * rounding(dtype)  # scale, shift and the result


# ------------------------------------------------------------------------------------ hooks, patches, replacements


def _of_level_1(network: Any, part: str) -> nn.Module:
    block = network.inner_blocks[1]
    return {"block": block, "convolution": block[0], "norm": block[1]}[part]


@pytest.mark.parametrize("part", ["block", "convolution", "norm"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run_once_and_count(part: str, kind: str) -> None:
    network, twin = pair(nn.BatchNorm2d)
    seen: list[int] = []
    hooks: dict[str, Callable[..., Any]] = {
        "forward": lambda module, inputs, output: seen.append(1) or 3 * output,
        "forward_pre": lambda module, inputs: seen.append(1) or (3 * inputs[0],),
        "full_backward": lambda module, grads, outputs: seen.append(1) or (3 * grads[0],),
        "full_backward_pre": lambda module, outputs: seen.append(1) or (3 * outputs[0],),
    }
    for model in (network, twin):
        getattr(_of_level_1(model, part), f"register_{kind}_hook")(hooks[kind])
    x = maps(grad=True)
    y = type(x)((name, m.detach().clone().requires_grad_()) for name, m in x.items())
    actual, expected = network(x), twin(y)
    assert_same(actual, expected)
    for results in (actual, expected):
        sum(p.sum() for p in results.values()).backward()
    assert len(seen) == 2 and error(x["1"].grad, y["1"].grad.double()) < 2e-5
    with torch.no_grad():
        assert served(lambda: network(x)) == LEVEL_1_MERGED, "the other levels stay fused"


def test_global_hooks_see_every_module() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    seen: dict[str, int] = {"network": 0, "twin": 0}
    for name, model in (("network", network), ("twin", twin)):
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: seen[name] + 1})
        )
        model(x)
        handle.remove()
    assert seen["network"] == seen["twin"] > 0
    assert served(lambda: network(x)) == ALL_FUSED, "fused again after the hook is removed"


def _other(**options: Any) -> Callable[[nn.Conv2d], nn.Module]:
    return lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding="same", **options)


# Edits of the convolution of level 1, and of its whole block.
EDITS: dict[str, Callable[[Any], nn.Module]] = {
    **{name: edit for name, edit in CONVOLUTION_EDITS.items() if name != "checkpointed"},  # it imports the compiler
    "grouped": _other(groups=4),
    "dilated": _other(dilation=2),
    "reflecting": _other(padding_mode="reflect"),
    "old spectral norm": nn.utils.spectral_norm,
    "block: appended": lambda block: block.append(nn.ReLU()),
    "block: wrapped": lambda block: nn.Sequential(block, nn.ReLU()),
    "block: identity": lambda block: nn.Sequential(block[0], nn.Identity()),
    "block: compiled": lambda block: torch.compile(block, backend="eager"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("blocks", ["inner_blocks", "layer_blocks"])
def test_edited_blocks_are_called(edit: str, blocks: str) -> None:
    network, twin = pair(nn.BatchNorm2d)
    for model in (network, twin):
        torch.manual_seed(1)
        owner, index = (getattr(model, blocks), 1) if edit.startswith("block") else (getattr(model, blocks)[1], 0)
        owner[index] = EDITS[edit](owner[index])
        model.eval()
    x = maps()
    with torch.no_grad():
        calls = served(lambda: assert_same(network(x), twin(x)))
        assert calls == (LEVEL_1_MERGED if blocks == "inner_blocks" else ALL_FUSED), "the other levels stay fused"
        assert convolved(lambda: network(x)) == (4 if blocks == "inner_blocks" else 3)


@pytest.mark.parametrize("edit", ["bare", *QUIET_EDITS])
def test_bare_and_quietly_edited_convolutions_are_fused(edit: str) -> None:
    network, twin = pair()
    for model in (network, twin):
        convolution = model.inner_blocks[1][0]
        model.inner_blocks[1] = convolution if edit == "bare" else nn.Sequential(QUIET_EDITS[edit](convolution))
    x = maps()
    assert served(lambda: assert_same(network(x), twin(x))) == ALL_FUSED


class Doubled(nn.Module):
    reads = 0

    def forward(self, weight: Tensor) -> Tensor:
        type(self).reads += 1
        return 2 * weight


@pytest.mark.parametrize("training", [False, True])
def test_parametrised_convolutions_are_called_once(training: bool) -> None:
    """Spectral norm advances by one step at each reading of its weight."""
    network, twin = pair()
    for model in (network, twin):
        parametrize.register_parametrization(model.inner_blocks[1][0], "weight", Doubled())
        parametrizations.spectral_norm(model.layer_blocks[1][0])
        parametrizations.weight_norm(model.inner_blocks[2][0])
    twin.load_state_dict(network.state_dict())
    network.train(training), twin.train(training)
    Doubled.reads = 0
    x = maps()
    assert served(lambda: network(x)) == [FUSED, MERGED, MERGED, FUSED] and Doubled.reads == 1
    twin(x)
    actual, expected = network(x), twin(x)
    assert_same(actual, expected)
    for results in (actual, expected):
        sum(p.sum() for p in results.values()).backward()
    for name, parameter in network.named_parameters():
        assert error(parameter.grad, dict(twin.named_parameters())[name].grad.double()) < 1e-4, name


def test_levels_of_two_dtypes_are_summed_as_eager_sums_them() -> None:
    class Widening(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    network, twin = pair()
    for model in (network, twin):
        model.bfloat16()
        for level in (0, 1):
            model.inner_blocks[level].append(Widening())
            model.layer_blocks[level].float()
    x = maps(dtype=torch.bfloat16)
    # On eager, which rounds where the twin does: a fused backend rounds a bfloat16 sum only once.
    with torch.no_grad(), use_backend("eager"):
        assert_same(network(x), twin(x))
