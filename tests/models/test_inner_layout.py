"""The layout that the network works in inside, and the one that it returns: the caller's, whichever the first is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import error, rounding
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from twins import CHANNELS, NAMES, WIDTH, Twin, maps, pair

import fpn_kernels
from fpn_kernels.backends import convolution, native
from fpn_kernels.backends.layouts import result_format
from fpn_kernels.modules import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
BF16 = torch.bfloat16
FEW_PIXELS = convolution._FEW_PIXELS
LAYOUTS = {"nchw": [NCHW] * 4, "nhwc": [NHWC] * 4, "mixed": [NCHW, NHWC, NHWC, NCHW]}


class Layouts(TorchDispatchMode):
    """Records every operator of the library that is called: its name, and the layouts of its map and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.memory_format, torch.memory_format]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fpn_kernels" and func._opname == "top_down_pathway":
            # The lateral connections that it is made of, from the coarsest level on.
            levels = zip(reversed(args[0]), reversed(result), strict=True)
            self.calls += [("lateral_connection", result_format(f), result_format(m)) for f, m in levels]
        elif func.namespace == "fpn_kernels" and func._opname == "output_conv_levels":
            levels = zip(args[0], result, strict=True)
            self.calls += [("output_conv", result_format(m), result_format(p)) for m, p in levels]
        elif func.namespace == "fpn_kernels":
            first = result if isinstance(result, Tensor) else result[0]
            self.calls.append((func._opname, result_format(args[0]), result_format(first)))
        return result


@pytest.fixture(autouse=True)
def many_pixels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The maps of the tests count as large, unless a test says otherwise, on a CPU for which oneDNN has bfloat16."""
    monkeypatch.setattr(convolution, "_FEW_PIXELS", 1)
    monkeypatch.setattr(convolution, "onednn_multiplies", lambda dtype: True)
    yield


def _in_layouts(
    x: OrderedDict[str, Tensor], formats: list[torch.memory_format], *, grad: bool = False
) -> OrderedDict[str, Tensor]:
    return OrderedDict(
        (name, m.detach().contiguous(memory_format=f).requires_grad_(grad))
        for (name, m), f in zip(x.items(), formats, strict=True)
    )


def _calls(network: nn.Module, x: Any) -> list[tuple[str, torch.memory_format, torch.memory_format]]:
    with torch.no_grad(), Layouts() as layouts:
        network(x)
    return layouts.calls


def _expected(
    features: list[torch.memory_format], inner: torch.memory_format | None
) -> list[tuple[str, torch.memory_format, torch.memory_format]]:
    """Four lateral connections from the coarsest level on, then four output convolutions from the finest on."""
    laterals = [("lateral_connection", f, inner or f) for f in reversed(features)]
    return laterals + [("output_conv", inner or f, f) for f in features]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "inner"), [(BF16, NHWC), (torch.float32, None), (torch.float16, None), (torch.float64, None)], ids=str
)
def test_bfloat16_works_in_nhwc_and_every_dtype_returns_the_callers_layout(
    dtype: torch.dtype, inner: torch.memory_format | None, layout: str
) -> None:
    network, twin = (module.to(dtype) for module in pair())
    x = _in_layouts(maps(dtype=dtype), LAYOUTS[layout])
    assert _calls(network, x) == _expected(LAYOUTS[layout], inner)
    with torch.no_grad():
        actual, eager = network(x), twin(x)
        # Channels last: there eager takes the float32 source index in float64 too.
        exact = copy.deepcopy(twin).double()(_in_layouts(x, [NHWC] * 4) | {n: m.double() for n, m in x.items()})
    for name, feature in x.items():
        assert actual[name].is_contiguous(memory_format=result_format(feature)), name
        due = {torch.float32: 4, torch.float64: 64}.get(dtype, 1) * rounding(dtype)
        assert error(actual[name], exact[name]) <= 1.1 * error(eager[name], exact[name]) + due, name


def test_small_maps_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_FEW_PIXELS", FEW_PIXELS)
    network = pair()[0].bfloat16()
    x = OrderedDict((n, torch.randn(1, c, 16, 16, dtype=BF16)) for n, c in zip(NAMES, CHANNELS, strict=True))
    assert _calls(network, x) == _expected([NCHW] * 4, None)
    # The same at a batch that makes them large.
    x = OrderedDict((n, m.expand(8, -1, -1, -1).contiguous()) for n, m in x.items())
    assert _calls(network, x) == _expected([NCHW] * 4, NHWC)


def test_a_backend_without_a_preference_changes_nothing() -> None:
    network = pair()[0].bfloat16()
    with fpn_kernels.use_backend("eager"):
        assert _calls(network, maps(dtype=BF16)) == _expected([NCHW] * 4, None)


def test_autocast_works_in_the_layout_of_its_dtype() -> None:
    network, _ = pair()
    x = maps()
    with torch.autocast("cpu", BF16):
        assert _calls(network, x)[-4:] == _expected([NCHW] * 4, NHWC)[-4:]
        assert all(p.is_contiguous() and p.dtype == BF16 for p in network(x).values())
    assert _calls(network, x) == _expected([NCHW] * 4, None)


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
        eager = twin(x)
    assert len(seen) == 8 and all(tensor.is_contiguous() for tensor in seen)
    assert list(actual) == list(eager)
    for name, value in eager.items():
        assert actual[name].is_contiguous(), name
        assert error(actual[name], value.double()) <= 8 * rounding(BF16), name


def test_a_block_that_runs_as_a_module_gets_the_callers_layout() -> None:
    class Viewing(nn.Module):
        """Fails on an NHWC map, as code that was only ever given NCHW ones may."""

        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], x.shape[1], -1).neg().view(x.shape)

    network, twin = pair()
    for model in (network, twin):
        model.layer_blocks[1] = Viewing()
        model.layer_blocks[3] = nn.Identity()  # the single-file ResNet FPN: P5 is M5
        model.bfloat16()
    x = maps(dtype=BF16)
    # Level by level, the coarsest first, as a block may change the map that it is given; no level is a copy.
    lateral, output = _expected([NCHW] * 4, NCHW)[::4]
    assert _calls(network, x) == [lateral, lateral, output, lateral, lateral, output]
    with torch.no_grad():
        actual, eager = network(x), twin(x)
    for name, value in eager.items():
        assert actual[name].is_contiguous(), name
        assert error(actual[name], value.double()) <= 8 * rounding(BF16), name


def test_without_an_output_convolution_there_is_nothing_to_gain() -> None:
    network = pair()[0].bfloat16()
    network.layer_blocks = nn.ModuleList(nn.Identity() for _ in range(4))
    assert _calls(network, maps(dtype=BF16)) == _expected([NCHW] * 4, None)[:4]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes", [[(1, 1)] * 4, [(7, 1), (3, 1), (1, 1), (1, 1)], [(4, 5), (9, 3), (2, 2), (6, 1)]], ids=str
)
@pytest.mark.parametrize(("channels", "width", "batch"), [([1, 1, 1, 1], 1, 2), (CHANNELS, WIDTH, 1), (CHANNELS, 3, 0)])
def test_degenerate_maps(
    channels: list[int], width: int, batch: int, sizes: list[tuple[int, int]], layout: str
) -> None:
    """One pixel or one channel, where the two layouts are the same bytes, and no image at all."""
    network, twin = FeaturePyramidNetwork(channels, width).bfloat16(), Twin(channels, width).bfloat16()
    twin.load_state_dict(network.state_dict())
    x = OrderedDict((n, torch.randn(batch, c, *s, dtype=BF16)) for n, c, s in zip(NAMES, channels, sizes, strict=True))
    x = _in_layouts(x, LAYOUTS[layout], grad=True)
    actual = network(x)
    for name, value in twin(x).items():
        assert actual[name].shape == value.shape
        assert actual[name].is_contiguous(memory_format=result_format(x[name])), name
        if batch:
            assert error(actual[name], value.detach().double()) <= 8 * rounding(BF16), name
    sum(p.sum() for p in actual.values()).backward()
    assert all(m.grad is not None and torch.isfinite(m.grad).all() for m in x.values())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_gradients_in_any_layout(dtype: torch.dtype, grad_layout: str, layout: str, batch: int) -> None:
    network, twin = (module.to(dtype) for module in pair())
    exact = copy.deepcopy(twin).double()
    x = maps(batch, dtype=dtype)
    inputs = [_in_layouts(x, LAYOUTS[layout], grad=True) for _ in range(2)]
    inputs.append(_in_layouts(OrderedDict((n, m.double()) for n, m in x.items()), [NHWC] * 4, grad=True))
    models = [network, twin, exact]
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


@pytest.mark.parametrize("by_adjoint", [False, True], ids=["by ATen's", "by the adjoint"])
def test_training_works_in_nhwc_backward_too(by_adjoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient is copied into the layout of its merged map once, by the fast copy."""
    monkeypatch.setattr(convolution, "adjoint_is_faster", lambda grad, by_tiles: by_adjoint)
    network = pair()[0].bfloat16()
    x = maps(1, dtype=BF16, grad=True)
    results = list(network(x).values())
    with Layouts() as layouts:
        torch.autograd.grad(results, [*x.values(), *network.parameters()], [torch.randn_like(p) for p in results])
    assert layouts.calls.count(("reorder", NCHW, NHWC)) == 4
    assert layouts.calls.count(("output_conv", NHWC, NHWC)) == (4 if by_adjoint else 0)
    assert {call for call in layouts.calls if call[0] == "output_conv"} <= {("output_conv", NHWC, NHWC)}
    assert {call for call in layouts.calls if call[0] == "lateral_connection"} == {("lateral_connection", NHWC, NCHW)}


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_compiles_and_exports_without_a_break(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    network = pair()[0].to(dtype)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    for extra in (0, 3, 6):
        shapes = {n: (2, m.shape[1], m.shape[2] + extra, m.shape[3] + extra) for n, m in maps().items()}
        x = OrderedDict((n, torch.randn(shape, dtype=dtype)) for n, shape in shapes.items())
        with torch.no_grad():
            actual, expected = compiled(x), network(x)
        for name in NAMES:
            assert torch.equal(actual[name], expected[name]) and actual[name].stride() == expected[name].stride()
    sizes = {n: {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} for n in NAMES}
    with torch.no_grad():
        program = torch.export.export(network, (maps(dtype=dtype),), dynamic_shapes=(sizes,))
    asked = [n.kwargs["memory_format"] for n in program.graph.nodes if "top_down_pathway" in str(n.target)]
    assert asked == [NHWC if dtype == BF16 else torch.preserve_format]
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
