"""The network may work in another layout inside; it returns maps in the caller's, with eager's numbers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from oracle import error, rounding
from targets import needs_library
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import CHANNELS, NAMES, WIDTH, Twin, maps, pair

from fpn_kernels.modules import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from fpn_kernels.operators import aten

pytestmark = needs_library

NCHW, NHWC = torch.contiguous_format, torch.channels_last
BF16 = torch.bfloat16
LAYOUTS = {"nchw": [NCHW] * 4, "nhwc": [NHWC] * 4, "mixed": [NCHW, NHWC, NHWC, NCHW]}
Maps = OrderedDict[str, Tensor]


@pytest.fixture(autouse=True)
def _works_in_nhwc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps of the tests count as large, on a CPU for which oneDNN has bfloat16: bfloat16 works in NHWC inside."""
    monkeypatch.setattr(aten, "_MIN_PIXELS", 1)
    monkeypatch.setattr(aten, "onednn_multiplies", lambda dtype: True)


def _in_layouts(x: Maps, formats: list[torch.memory_format], *, grad: bool = False) -> Maps:
    return OrderedDict(
        (name, m.detach().contiguous(memory_format=f).requires_grad_(grad))
        for (name, m), f in zip(x.items(), formats, strict=True)
    )


def _check(actual: Maps, eager: Maps, like: Maps) -> None:
    assert list(actual) == list(eager)
    for name, value in eager.items():
        if name in like:
            assert actual[name].is_contiguous(memory_format=suggest_memory_format(like[name])), name
        assert error(actual[name], value.detach().double()) <= 8 * rounding(value.dtype), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16, torch.float64], ids=str)
def test_each_dtype_returns_the_callers_layout(dtype: torch.dtype, layout: str) -> None:
    network, twin = (module.to(dtype) for module in pair())
    x = _in_layouts(maps(dtype=dtype), LAYOUTS[layout])
    with torch.no_grad():
        actual, eager = network(x), twin(x)
        # Channels last: there eager takes the float32 source index in float64 too.
        exact = copy.deepcopy(twin).double()(_in_layouts(x, [NHWC] * 4) | {n: m.double() for n, m in x.items()})
    for name, feature in x.items():
        assert actual[name].is_contiguous(memory_format=suggest_memory_format(feature)), name
        due = {torch.float32: 4, torch.float64: 64}.get(dtype, 1) * rounding(dtype)
        assert error(actual[name], exact[name]) <= 1.1 * error(eager[name], exact[name]) + due, name


def test_autocast_returns_the_callers_layout() -> None:
    network, _ = pair()
    with torch.autocast("cpu", BF16):
        assert all(p.is_contiguous() and p.dtype == BF16 for p in network(maps()).values())


@pytest.mark.parametrize("extra", [LastLevelMaxPool(), LastLevelP6P7(WIDTH, WIDTH), LastLevelP6P7(CHANNELS[-1], WIDTH)])
def test_extra_levels_are_made_from_maps_in_the_callers_layout(extra: nn.Module) -> None:
    network, twin = pair()
    network.extra_blocks = twin.extra_blocks = extra
    network.bfloat16(), twin.bfloat16()
    seen: list[Tensor] = []
    handle = extra.register_forward_pre_hook(lambda module, inputs: seen.extend([*inputs[0], *inputs[1]]))
    x = maps(dtype=BF16)
    with torch.no_grad():
        actual = network(x)
        handle.remove()
        _check(actual, twin(x), x)
    assert len(seen) == 8 and all(tensor.is_contiguous() for tensor in seen)


class _Viewing(nn.Module):
    """Fails on an NHWC map, as code that was only ever given NCHW ones may."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1).neg().view(x.shape)


def test_a_block_that_runs_as_a_module_gets_the_callers_layout() -> None:
    network, twin = pair()
    for model in (network, twin):
        model.layer_blocks[1] = _Viewing()
        model.layer_blocks[3] = nn.Identity()  # the single-file ResNet FPN: P5 is M5
        model.bfloat16()
    x = maps(dtype=BF16)
    with torch.no_grad():
        _check(network(x), twin(x), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "width", "batch", "sizes"),
    [
        pytest.param([1, 1, 1, 1], 1, 2, [(1, 1)] * 4, id="one pixel of one channel: both layouts are the same bytes"),
        pytest.param(CHANNELS, WIDTH, 1, [(7, 1), (3, 1), (1, 1), (1, 1)], id="one column"),
        pytest.param(CHANNELS, 3, 0, [(4, 5), (9, 3), (2, 2), (6, 1)], id="no image"),
    ],
)
def test_degenerate_maps(
    channels: list[int], width: int, batch: int, sizes: list[tuple[int, int]], layout: str
) -> None:
    network, twin = FeaturePyramidNetwork(channels, width).bfloat16(), Twin(channels, width).bfloat16()
    twin.load_state_dict(network.state_dict())
    x = OrderedDict((n, torch.randn(batch, c, *s, dtype=BF16)) for n, c, s in zip(NAMES, channels, sizes, strict=True))
    x = _in_layouts(x, LAYOUTS[layout], grad=True)
    actual = network(x)
    _check(actual, twin(x), x)
    sum(p.sum() for p in actual.values()).backward()
    assert all(m.grad is not None and torch.isfinite(m.grad).all() for m in x.values())


@pytest.mark.parametrize("by_adjoint", [False, True], ids=["by ATen's gradients", "by the adjoint"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_gradients_in_any_layout(
    dtype: torch.dtype, grad_layout: str, layout: str, by_adjoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aten, "adjoint_is_faster", lambda grad, by_tiles: by_adjoint)
    network, twin = (module.to(dtype) for module in pair())
    exact = copy.deepcopy(twin).double()
    x = maps(1, dtype=dtype)
    inputs = [_in_layouts(x, LAYOUTS[layout], grad=True) for _ in range(2)]
    inputs.append(_in_layouts(OrderedDict((n, m.double()) for n, m in x.items()), [NHWC] * 4, grad=True))
    models: list[Any] = [network, twin, exact]
    results = [list(model(m).values()) for model, m in zip(models, inputs, strict=True)]
    grads = [torch.randn_like(p).contiguous(memory_format=LAYOUTS[grad_layout][0]) for p in results[0]]
    gradients = [
        torch.autograd.grad(ps, [*m.values(), *model.parameters()], [g.to(ps[0].dtype) for g in grads])
        for model, m, ps in zip(models, inputs, results, strict=True)
    ]
    for ours, eager, true in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        # The chain through the levels rounds at other places than eager's: a few roundings more or less.
        assert error(ours, true) <= 1.5 * error(eager, true) + 4 * rounding(dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_compiles_and_exports_without_a_break(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    network = pair()[0].to(dtype)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    for extra in (0, 3):
        shapes = {n: (2, m.shape[1], m.shape[2] + extra, m.shape[3] + extra) for n, m in maps().items()}
        x = OrderedDict((n, torch.randn(shape, dtype=dtype)) for n, shape in shapes.items())
        with torch.no_grad():
            actual, expected = compiled(x), network(x)
        for name in NAMES:
            assert torch.equal(actual[name], expected[name]) and actual[name].stride() == expected[name].stride()
    sizes = {n: {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} for n in NAMES}
    with torch.no_grad():
        program = torch.export.export(network, (maps(dtype=dtype),), dynamic_shapes=(sizes,))
    x = maps(dtype=dtype)
    for name, value in program.module()(x).items():
        assert torch.equal(value, network(x)[name]) and value.is_contiguous(), name


def test_fake_tensors_have_the_strides_of_real_ones() -> None:
    network = pair()[0].bfloat16()
    x = _in_layouts(maps(dtype=BF16), LAYOUTS["mixed"])
    real = network(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = network(OrderedDict((n, mode.from_tensor(m)) for n, m in x.items()))
    assert {n: p.stride() for n, p in fake.items()} == {n: p.stride() for n, p in real.items()}
