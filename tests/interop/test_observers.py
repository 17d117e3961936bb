"""Where other code observes a call, or has replaced a part of it, a pyramid runs as the original does.

The observers are transforms, forward-mode AD, tracers, and subclasses or patches of the pyramid's methods.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from alterations import ours_of
from foreign import torchvision_twin
from fusion_cases import leaves
from resnet_twins import single_file_fpn
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from twins import CHANNELS, NAMES, WIDTH, maps, scramble

import fpn_kernels
from fpn_kernels.interop.swapping import is_fused
from fpn_kernels.modules import FeaturePyramidNetwork

Twin = torchvision_twin.FeaturePyramidNetwork


def _pair(norm: Any = None, cls: type[nn.Module] = Twin) -> tuple[Any, Any]:
    twin = cls(CHANNELS, WIDTH, None, norm)
    scramble(twin)
    return copy.deepcopy(twin).eval(), twin.eval()


def _stand_ins(norm: Any = None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A fused module and this library's, each with torchvision's of the same parameters."""
    network, twin = _pair(norm)
    yield fpn_kernels.fuse(network), twin
    yield ours_of(copy.deepcopy(twin)).eval(), twin


def _assert_equal(actual: Any, expected: Any) -> None:
    for got, want in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Listed(nn.Module):
    """A pyramid of maps without names."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.fpn = fpn

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.fpn(OrderedDict(zip(NAMES, features, strict=True))).values())


class Image(nn.Module):
    """Maps of an image, by name, for a pyramid."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        self.body, self.fpn = nn.ModuleList(nn.Conv2d(3, c, 1, 2**n) for n, c in enumerate(CHANNELS)), fpn

    def forward(self, x: Tensor) -> Any:
        return self.fpn({str(n): conv(x) for n, conv in enumerate(self.body)})


# ------------------------------------------------------------------------------------ transforms and tracers


def test_transforms_and_forward_mode_see_the_original() -> None:
    for network, twin in _stand_ins():
        x, tangents = list(maps().values()), list(maps().values())
        both = (Listed(network), Listed(twin))
        _assert_equal(*(torch.func.jvp(f, tuple(x), tuple(tangents)) for f in both))
        stacked = [torch.stack([m, 2 * m]) for m in x]
        _assert_equal(*(torch.vmap(f)(*stacked) for f in both))


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


def test_torch_jit_traces_run_without_this_library() -> None:
    for network, twin in _stand_ins():
        traced = torch.jit.trace(Listed(network), tuple(maps().values()))
        assert "fpn_kernels::" not in str(traced.inlined_graph)
        x = maps()
        _assert_equal(traced(*x.values()), tuple(twin(x).values()))


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: FeaturePyramidNetwork([4], 4), "torch.jit.trace, or load its state_dict into"),
        (lambda: fpn_kernels.ResNetFPN((1, 1, 1, 1), 4, width=4), "torch.jit.trace, or load its state_dict into"),
        (lambda: fpn_kernels.fuse(_pair()[0]), r"call fpn_kernels.unfuse\(model\)"),
    ],
)
def test_torch_jit_script_names_a_remedy(make: Any, remedy: str) -> None:
    with pytest.raises(TypeError, match=rf"torch.jit.script cannot compile .*{remedy}"):
        torch.jit.script(nn.Sequential(make()))


# ------------------------------------------------------------------------ methods that were overridden or patched


def _negated(cls: type) -> type:
    """A subclass that overrides a method which the forward calls."""

    class Negated(cls):  # type: ignore[misc]
        def get_result_from_layer_blocks(self, x: Tensor, idx: int) -> Tensor:
            return -super().get_result_from_layer_blocks(x, idx)

    return Negated


def test_methods_that_a_subclass_overrides() -> None:
    twin, _ = _pair(cls=_negated(Twin))
    with pytest.raises(ValueError, match="Negated has a get_result_from_layer_blocks of its own, which the forward of"):
        fpn_kernels.fuse(twin)
    ours = _negated(FeaturePyramidNetwork)(CHANNELS, WIDTH)
    ours.load_state_dict(twin.state_dict())
    _assert_equal(ours(x := maps()), twin(x))


@pytest.mark.parametrize("on", ["instance", "class"])
@pytest.mark.parametrize("name", ["get_result_from_inner_blocks", "get_result_from_layer_blocks"])
def test_methods_patched_after_fusing(name: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubling(cls: type) -> Callable[..., Tensor]:
        original = getattr(cls, name)
        return lambda self, x, idx: 2 * original(self, x, idx)

    pairs = list(_stand_ins())
    if on == "class":
        for cls in (Twin, FeaturePyramidNetwork):
            monkeypatch.setattr(cls, name, doubling(cls))
    else:
        for model in {model for pair in pairs for model in pair}:
            setattr(model, name, types.MethodType(doubling(type(model)), model))
    for network, twin in pairs:
        _assert_equal(network(x := maps()), twin(x))


def test_a_forward_patched_onto_the_class_after_fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, twin = _pair()
    fpn_kernels.fuse(network)
    original = Twin.forward
    monkeypatch.setattr(Twin, "forward", lambda self, x: {n: 2 * p for n, p in original(self, x).items()})
    _assert_equal(network(x := maps()), twin(x))
    with pytest.raises(ValueError, match="the forward of FeaturePyramidNetwork was decorated or replaced"):
        fpn_kernels.fuse(twin)


def test_wrappers_that_pass_attributes_on_are_no_pyramids() -> None:
    model = nn.ModuleDict({"fpn": CheckpointWrapper(single_file_fpn([1, 1, 1, 1], 1))})
    _, report = fpn_kernels.fuse(model, report=True)
    assert list(report.fused) == ["fpn._checkpoint_wrapped_module"] and not is_fused(model["fpn"])
    _, report = fpn_kernels.fuse(torch.compile(_pair()[0], backend="eager"), report=True)
    assert list(report.fused) == ["_orig_mod"]


def test_arguments_that_the_dialect_does_not_know_go_to_the_original() -> None:
    network, twin = _pair()
    fpn_kernels.fuse(network)
    _assert_equal(network(x=(x := maps())), twin(x))
    for model in (network, twin):
        with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
            model(x, masks=None)
