"""What the pyramid fuses, and what it runs as the module it is: nothing hooked, patched or replaced is skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import error, rounding
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from twins import assert_same, convolved, group_norm, maps, pair, served

from fpn_kernels.backends.selection import use_backend
from fpn_kernels.modules import FeaturePyramidNetwork, FrozenBatchNorm2d
from fpn_kernels.modules.batch_norm import fold, has_fixed_statistics

ALL_FUSED = ["lateral_connection"] * 4
LEVEL_1_MERGED_APART = ["lateral_connection", "lateral_connection", "upsample_add", "lateral_connection"]


class ActivatedBatchNorm2d(nn.BatchNorm2d):
    """A norm with the tensors of BatchNorm and a forward that is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class InPlaceActivatedNorm(nn.Module):
    """The structure of a frozen BatchNorm under another name, with an activation (as in inplace_abn)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 1).relu()


def detectron2_like(channels: int) -> nn.Module:
    """Another library's frozen BatchNorm: the same name and tensors, another class."""

    class FrozenBatchNorm2d(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )

    source = FrozenBatchNorm2d()
    source.eps = 1e-5
    for name in ("weight", "bias", "running_mean", "running_var"):
        source.register_buffer(name, torch.ones(channels))
    return source


def frozen_with_activation(channels: int) -> nn.Module:
    cls = type("Activated", (FrozenBatchNorm2d,), {"forward": lambda self, x: x.relu()})
    return cls(channels)


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
        (InPlaceActivatedNorm, False),
        (frozen_with_activation, False),
    ],
    ids=["bn", "sync", "frozen", "d2", "no-affine", "eps", "no-stats", "gn", "in", "bn-relu", "abn", "frozen-relu"],
)
def test_norms_that_are_folded_and_norms_that_are_not(norm_layer: Any, is_folded: bool) -> None:
    network, twin = pair(norm_layer)
    x = maps()
    with torch.no_grad():
        assert_same(network(x), twin(x))
        calls = served(lambda: network(x))
    assert calls == (ALL_FUSED if is_folded else ["upsample_add"] * 3)


def test_batch_norm_in_training_is_run_and_eval_afterwards_sees_its_statistics() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    network(x)  # a fold that was kept would show below
    network.train(), twin.train()
    assert served(lambda: network(x)) == ["upsample_add"] * 3
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


def _half(network: nn.Module, norm_dtype: torch.dtype) -> nn.Module:
    network.half()
    for norm in (m for m in network.modules() if hasattr(m, "running_var")):
        norm.to(norm_dtype)
    return network


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, FrozenBatchNorm2d, detectron2_like], ids=["bn", "frozen", "d2"])
@pytest.mark.parametrize("kind", ["float16", "float32 norms", "autocast"])
@pytest.mark.parametrize("grad", [False, True])
def test_what_overflows_when_folded_is_finite(norm_layer: Any, kind: str, grad: bool) -> None:
    """A mean of 250 times 1 / sqrt(eps) is no float16."""
    network, twin = pair(norm_layer)
    for model in (network, twin):
        for norm in (m for m in model.modules() if hasattr(m, "running_var")):
            norm.running_mean.fill_(250.0), norm.running_var.zero_()
            norm.weight.data.fill_(0.1), norm.bias.data.zero_()
        if kind != "autocast":
            _half(model, torch.float16 if kind == "float16" else torch.float32)
    x = maps(dtype=torch.float32 if kind == "autocast" else torch.float16, grad=grad)
    with torch.autocast("cpu", torch.float16, enabled=kind == "autocast"):
        actual, expected = network(x), twin(x)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and value.isfinite().all() == actual[name].isfinite().all()
        # The sums of the 3x3 convolutions, of 12 times 9 products near 8000, cancel.
        torch.testing.assert_close(actual[name].float(), value.float(), rtol=2e-2, atol=64.0, equal_nan=True)


def test_no_norm_is_folded_in_16_bits() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert served(lambda: network(x)) == ["upsample_add"] * 3
    for model in (network, twin):
        model.bfloat16()
    x = maps(dtype=torch.bfloat16)
    with torch.no_grad(), use_backend("eager"):
        assert served(lambda: assert_same(network(x), twin(x))) == ["upsample_add"] * 3


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
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0), norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(2, 6, 4, 5, dtype=dtype)
    exact = copy.deepcopy(norm).double()(x.double())
    plain, tracked = norm(x), norm(x.clone().requires_grad_())
    assert plain.dtype == tracked.dtype == dtype and tracked.requires_grad
    for result in (plain, tracked):
        assert error(result.detach(), exact) <= 3 * rounding(dtype)  # scale, shift and the result
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


# ------------------------------------------------------------------------------------ hooks and patches


def _of_level_1(network: FeaturePyramidNetwork, part: str) -> nn.Module:
    block = network.inner_blocks[1]
    return {"block": block, "convolution": block[0], "norm": block[1]}[part]


@pytest.mark.parametrize("part", ["block", "convolution", "norm"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run_and_count(part: str, kind: str) -> None:
    network, twin = pair(nn.BatchNorm2d)
    seen = []
    for model in (network, twin):
        module = _of_level_1(model, part)
        hook: dict[str, Callable[..., Any]] = {
            "forward": lambda module, inputs, output: seen.append(1) or 3 * output,
            "forward_pre": lambda module, inputs: seen.append(1) or (3 * inputs[0],),
            "full_backward": lambda module, grads, outputs: seen.append(1) or (3 * grads[0],),
            "full_backward_pre": lambda module, outputs: seen.append(1) or (3 * outputs[0],),
        }
        getattr(module, f"register_{kind}_hook")(hook[kind])
    x, y = maps(grad=True), maps()
    for name, m in x.items():
        y[name] = m.detach().clone().requires_grad_()
    calls = served(lambda: None)
    actual, expected = network(x), twin(y)
    assert_same(actual, expected)
    sum(p.sum() for p in actual.values()).backward()
    sum(p.sum() for p in expected.values()).backward()
    assert len(seen) == 2 and error(x["1"].grad, y["1"].grad.double()) < 2e-5
    with torch.no_grad():
        calls = served(lambda: network(x))
    assert calls == LEVEL_1_MERGED_APART, "the other levels stay fused"


def test_hooks_on_an_output_block_run() -> None:
    network, twin = pair()
    for model in (network, twin):
        model.layer_blocks[0][0].register_forward_hook(lambda module, inputs, output: -output)
    x = maps()
    assert_same(network(x), twin(x))
    assert served(lambda: network(x)) == ALL_FUSED, "the pathway itself is not hooked"


def test_global_hooks_see_every_module() -> None:
    network, twin = pair(nn.BatchNorm2d)
    x = maps()
    seen: dict[str, int] = {}
    for name, model in (("network", network), ("twin", twin)):
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: seen.get(name, 0) + 1})
        )
        model(x)
        handle.remove()
    assert seen["network"] == seen["twin"] > 0
    assert served(lambda: network(x)) == ALL_FUSED, "and once it is gone, all is fused again"


def test_a_forward_patched_onto_an_instance_is_called() -> None:
    network, twin = pair()
    for model in (network, twin):
        conv = model.inner_blocks[1][0]
        conv.forward = lambda x, conv=conv: 2 * nn.Conv2d.forward(conv, x)
    x = maps()
    assert served(lambda: assert_same(network(x), twin(x))) == LEVEL_1_MERGED_APART


class LowRankAdapter(nn.Module):
    """A convolution wrapped as LoRA adapters wrap it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        torch.manual_seed(1)
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, padding=base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class DoublingConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _subclassed(conv: nn.Conv2d) -> nn.Module:
    conv.__class__ = DoublingConv2d
    return conv


def _grouped(conv: nn.Conv2d) -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, groups=4)


def _dilated(conv: nn.Conv2d) -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=2, dilation=2)


def _reflecting(conv: nn.Conv2d) -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize("replace", [LowRankAdapter, _subclassed, _grouped, _dilated, _reflecting])
@pytest.mark.parametrize("blocks", ["inner_blocks", "layer_blocks"])
def test_replaced_convolutions_are_called(replace: Callable[[nn.Conv2d], nn.Module], blocks: str) -> None:
    network, twin = pair(nn.BatchNorm2d)
    for model in (network, twin):
        getattr(model, blocks)[1][0] = replace(getattr(model, blocks)[1][0])
    x = maps()
    calls = served(lambda: assert_same(network(x), twin(x)))
    assert calls == (LEVEL_1_MERGED_APART if blocks == "inner_blocks" else ALL_FUSED)
    assert convolved(lambda: network(x)) == (4 if blocks == "inner_blocks" else 3)


@pytest.mark.parametrize(
    "edit",
    [
        lambda block: block.append(nn.ReLU()),
        lambda block: nn.Sequential(block, nn.ReLU()),
        lambda block: nn.Sequential(block[0], nn.Identity()),
        lambda block: torch.compile(block, backend="eager"),
    ],
    ids=["appended", "wrapped", "identity", "compiled"],
)
def test_rebuilt_blocks_are_called(edit: Callable[[nn.Module], nn.Module]) -> None:
    network, twin = pair(nn.BatchNorm2d)
    for model in (network, twin):
        model.inner_blocks[1] = edit(model.inner_blocks[1])
    x = maps()
    with torch.no_grad():
        assert served(lambda: assert_same(network(x), twin(x))) == LEVEL_1_MERGED_APART


def test_bare_convolutions_are_fused() -> None:
    network, twin = pair()
    for model in (network, twin):
        model.inner_blocks[1] = model.inner_blocks[1][0]
    x = maps()
    assert served(lambda: assert_same(network(x), twin(x))) == ALL_FUSED


class Doubled(nn.Module):
    reads = 0

    def forward(self, weight: Tensor) -> Tensor:
        type(self).reads += 1
        return 2 * weight


@pytest.mark.parametrize("training", [False, True])
def test_parametrised_convolutions_are_called(training: bool) -> None:
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
    calls = served(lambda: network(x))
    assert Doubled.reads == 1 and calls == [ALL_FUSED[0], "upsample_add", "upsample_add", ALL_FUSED[0]]
    twin(x)
    actual, expected = network(x), twin(x)
    assert_same(actual, expected)
    for results in (actual, expected):
        sum(p.sum() for p in results.values()).backward()
    for name, parameter in network.named_parameters():
        assert error(parameter.grad, dict(twin.named_parameters())[name].grad.double()) < 1e-4, name


class HalvedWeight(Tensor):
    """A wrapper like a quantised weight or a DTensor: it stores half of what it stands for."""

    @staticmethod
    def __new__(cls, half: Tensor) -> HalvedWeight:
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half: Tensor) -> None:
        self.half_of_it = half

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half_of_it"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        assert func.namespace == "aten", "a fused operator was handed the wrapper"
        return func(*(2 * a.half_of_it if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def test_wrapped_weights_are_left_to_their_module() -> None:
    network, twin = pair()
    expected = twin(x := maps())
    conv = network.inner_blocks[1][0]
    conv.weight = nn.Parameter(HalvedWeight(conv.weight.detach() / 2), requires_grad=False)
    with torch.no_grad():
        assert served(lambda: assert_same(network(x), expected)) == LEVEL_1_MERGED_APART


def test_old_style_spectral_norm_is_a_hook() -> None:
    network, twin = pair()
    for model in (network, twin):
        torch.manual_seed(2)
        nn.utils.spectral_norm(model.inner_blocks[1][0])
    x = maps()
    assert served(lambda: assert_same(network.train()(x), twin.train()(x))) == LEVEL_1_MERGED_APART


def test_levels_of_two_dtypes_are_summed_as_eager_sums_them() -> None:
    class Widening(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    network, twin = pair()
    for model in (network, twin):
        model.bfloat16()
        model.inner_blocks[1].append(Widening())
        model.inner_blocks[0].append(Widening())
        for level in (0, 1):
            model.layer_blocks[level].float()
    x = maps(dtype=torch.bfloat16)
    # On eager, which rounds where the twin does: a fused backend rounds a bfloat16 sum once only.
    with torch.no_grad(), use_backend("eager"):
        assert_same(network(x), twin(x))
