"""`lateral_connection` with the weight kept in shared memory: emulated on the CPU, compiled elsewhere, run on a GPU."""

from __future__ import annotations

import inspect
import random
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from gluon_emulation import StandsStillError, emulate
from samples import random_map
from targets import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter knows nothing of Gluon", allow_module_level=True)

from fpn_kernels.backends.triton import (
    autotune,
    eligibility,
    geometry,
    lateral_connection,
    launching,
    stationary_kernels,
    top_down_pathway,
)
from fpn_kernels.backends.triton import lateral_connection_stationary as stationary
from fpn_kernels.backends.triton.lateral_connection_stationary import TABLE, StationaryConfig

NHWC = torch.channels_last
FORMATS = {"nhwc": NHWC, "nchw": torch.contiguous_format}
AXES = {"channels": "nhwc", "pixels": "nchw"}


class _Emulated:
    """In the place of `launching.Launch`: the same kernel, grid and arguments, emulated."""

    previous_ends: Callable[[], None] = staticmethod(lambda: None)
    # In the kernel's own module's place.
    module: Any = None

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: Any, constants: Any, like: Tensor) -> None:
        self.names, self.grid, self.numbers, self.constants = kernel.arg_names, grid, numbers, constants
        self.module = self.module or sys.modules[kernel.fn.__module__]

    def __call__(self, *leading: Any) -> None:
        known = (*leading, *self.numbers)
        rest = [self.constants[name] for name in self.names[len(known) :]]
        emulate(
            *(self.module, "connect", self.grid[0], (*known, *rest)),
            seed=random.randrange(1 << 30),
            previous_ends=self.previous_ends,
        )


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> type[_Emulated]:
    class Launch(_Emulated):
        pass

    monkeypatch.setattr(stationary.launching, "Launch", Launch)
    return Launch


def _call(config: StationaryConfig, device: str = "cpu", **changed: Any) -> dict[str, Any]:
    """A call with tails along every axis: more pixels than a tile, channels that no tile divides."""
    sizes = {
        **{"batch": 2, "in_channels": 2 * config.depth - 24, "out_channels": config.channels + 8},
        **{
            "height": config.rows + 2,
            "width": config.columns + 6,
            "dtype": random.choice([torch.float16, torch.bfloat16]),
        },
        **changed,
    }
    batch, in_channels, out_channels = sizes["batch"], sizes["in_channels"], sizes["out_channels"]
    height, width, dtype = sizes["height"], sizes["width"], sizes["dtype"]
    feature = random_map((batch, in_channels, height, width), dtype, layout="nhwc")
    top = random_map((batch, out_channels, height // 2, width // 2), dtype, layout="nhwc")
    weight = (torch.randn(out_channels, in_channels, dtype=torch.float64) / in_channels**0.5).to(dtype)
    made = {"feature": feature, "weight": weight, "bias": torch.randn(out_channels).to(dtype), "top": top}
    return {name: tensor.to(device) for name, tensor in made.items()}


def _turned(weight: Tensor) -> Tensor:
    """The same numbers, laid out as in the gradient of the feature."""
    return weight.t().contiguous().t()


def _connect(
    config: StationaryConfig,
    call: dict[str, Any],
    gain: float,
    link: Any = launching.ALONE,
    layout: torch.memory_format = NHWC,
    mode: str = "nearest",
) -> Tensor:
    feature, weight, top = call["feature"], call["weight"], call["top"]
    shape = (feature.shape[0], weight.shape[0], *feature.shape[2:])
    out = torch.full(shape, float("nan"), dtype=feature.dtype, device=feature.device).contiguous(memory_format=layout)
    refusal = getattr(eligibility, "lateral_connection_stationary" + "_flat" * config.flat)
    assert refusal(feature, weight, call["bias"], top, out) is None
    run = stationary.plan(config, feature, weight, call["bias"], top, out, mode, link)
    run(feature, weight, call["bias"], top, out, gain)
    return out


def _check(out: Tensor, call: dict[str, Any], gain: float, mode: str = "nearest") -> None:
    """Within one rounding of the result and a few of the float32 sum."""
    exact = oracle.lateral_connection(call["feature"], call["weight"], call["bias"], call["top"], mode, gain)
    assert torch.isfinite(out).all(), "an element was not written, or was made of one that was not there yet"
    bound = oracle.rounding(out.dtype) * exact.abs() * 1.001 + 64 * torch.finfo(torch.float32).eps
    excess = (out.double() - exact).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float(excess.max())} more than rounding allows"


@pytest.mark.parametrize("size", TABLE)
@pytest.mark.parametrize("processors", [1, 3, 132])
def test_every_tile(size: str, processors: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one multiprocessor, which has all tiles, on three, and on more than there are tiles."""
    config = TABLE[size]
    monkeypatch.setattr(geometry, "_DEFAULT_PROCESSORS", processors)
    call = _call(config)
    _check(_connect(config, call, 0.7), call, 0.7)
    call = {**call, "bias": None, "top": None, "weight": _turned(call["weight"])}
    _check(_connect(config, call, 1.0), call, 1.0)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 16])
def test_chunks_go_round_the_ring(chunks: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer chunks than slots, as many, more: whoever holds slots is waited for, and not for ever."""
    monkeypatch.setattr(geometry, "_DEFAULT_PROCESSORS", 1)
    config = TABLE["small"]
    for in_channels in (64 * chunks, 64 * chunks - 56):
        call = _call(config, in_channels=in_channels, out_channels=64, height=12, width=32)
        _check(_connect(config, call, -1.5), call, -1.5)


def test_maps_that_are_views(emulated: Any) -> None:
    """Crops of larger maps, whose rows are further apart; maps of one row, of one column."""
    config = TABLE["small"]
    call = _call(config, height=8, width=12)
    call["feature"] = call["feature"][:, 8:72, 2:, :8]
    call["top"] = call["top"][:, :, 1:, :4]
    call["weight"] = call["weight"][:, :64]
    _check(_connect(config, call, 1.0), call, 1.0)
    for height, width in ((1, 1), (1, 24), (9, 1)):
        call = {**_call(config, height=height, width=width), "top": None}
        _check(_connect(config, call, 1.0), call, 1.0)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        *((config, "nhwc") for config in TABLE.values()),
        *((stationary.FLAT_TABLE[axis, "medium"], layout) for axis, layout in AXES.items()),
    ],
    ids=str,
)
def test_nothing_depends_on_the_launch_before_until_it_has_ended(
    config: StationaryConfig, layout: str, emulated: Any
) -> None:
    """Until then the coarser map is not there, and what the result is written over may still be read."""
    call = _call(config, out_channels=2 * config.channels, height=10, width=24)
    feature, weight, bias = call["feature"].contiguous(memory_format=FORMATS[layout]), call["weight"], call["bias"]
    top = call["top"].contiguous(memory_format=FORMATS[layout])
    call.update(feature=feature, top=top)
    coarse = top.clone()
    top.fill_(float("nan"))
    shape = (2, weight.shape[0], *feature.shape[2:])
    out = torch.full(shape, 7.0, dtype=feature.dtype).contiguous(memory_format=FORMATS[layout])
    untouched: list[bool] = []

    def ends() -> None:
        untouched.append(bool((out == 7.0).all()))
        top.copy_(coarse)

    emulated.previous_ends = staticmethod(ends)
    link = launching.Link(follows=True, leads=True)
    stationary.plan(config, feature, weight, bias, top, out, "nearest", link)(feature, weight, bias, top, out, 1.0)
    assert untouched[0], "written while the launch before may still read it"
    _check(out, call, 1.0)


def _broken(function: str, old: str, new: str) -> types.ModuleType:
    """The kernels with a line of one function changed, wherever it has that line."""
    module = types.ModuleType("broken")
    vars(module).update(vars(stationary_kernels))
    source = textwrap.dedent(inspect.getsource(getattr(stationary_kernels, function).fn))
    assert old in source, f"{function} has changed: it has no {old!r}"
    source = "\n".join(line for line in source.replace(old, new).split("\n") if not line.startswith("@"))
    names = dict(vars(stationary_kernels))
    exec(compile("from __future__ import annotations\n" + source, function, "exec"), names)
    setattr(module, function, types.SimpleNamespace(fn=names[function]))
    return module


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        # Pixels multiplied before they have come, or written over before they were multiplied.
        ("multiply", "mbarrier.wait(full.index(slot), ((begin + k) // STAGES) & 1)", "pass"),
        ("load_features", "mbarrier.wait(free.index(slot), (chunk // STAGES + 1) & 1)", "pass"),
        # Coarse pixels of the tile before, or of the tile after.
        ("multiply", "mbarrier.wait(top_full.index(GROUP), (count // GROUPS) & 1)", "pass"),
        ("load_tops", "mbarrier.wait(free.index(slot), (count // GROUPS + 1) & 1)", "pass"),
        # The weight; the last product; the bulk copy of the result; its fence.
        ("multiply", "mbarrier.wait(weight_full.index(k), 0)", "pass"),
        ("multiply", "total = warpgroup_mma_wait(0, deps=[total])", "pass"),
        ("multiply", "tma.store_wait(0)", "pass"),
        ("multiply", "fence_async_shared()", "pass"),
        ("multiply", "mbarrier.arrive(top_free.index(GROUP), count=1)", "pass"),
        ("multiply", "mbarrier.arrive(free.index((begin + k - 1) % STAGES), count=1)", "pass"),
        ("multiply", "        mbarrier.arrive(free.index(last), count=1)", "        pass"),
        # The turns, without which one parity stands for two phases.
        ("multiply", "mbarrier.wait(turns.index(GROUP), (count // GROUPS + 1 - GROUP) & 1)", "pass"),
        ("multiply", "mbarrier.arrive(turns.index(1 - GROUP), count=1)", "pass"),
    ],
)
def test_the_emulation_finds_a_broken_schedule(
    function: str, old: str, new: str, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks above can fail: without any one of its waits and arrivals the kernel is wrong, or stands still."""
    monkeypatch.setattr(geometry, "_DEFAULT_PROCESSORS", 1)
    emulated.module = _broken(function, old, new)
    config = TABLE["small"]
    with pytest.raises(AssertionError):
        for _ in range(60):  # the order is drawn by lot
            call = _call(config, batch=1, in_channels=320, out_channels=64, height=24, width=48)
            _check(_connect(config, call, 1.0), call, 1.0)


def test_standing_still_is_told() -> None:
    module = _broken("load_tops", "for tile in range(first, tiles, step):", "for tile in range(0):")
    call = _call(TABLE["small"])
    captured: list[Any] = []

    class Launch(_Emulated):
        def __call__(self, *leading: Any) -> None:
            captured.append(self)
            super().__call__(*leading)

    Launch.module = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stationary.launching, "Launch", Launch)
        with pytest.raises(StandsStillError, match="multiply"):
            _connect(TABLE["small"], call, 1.0)
    assert captured


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feature": lambda x: x.contiguous()}, "feature"),
        ({"top": lambda x: x.contiguous()}, "top"),
        ({"top": lambda x: x[:, :, :, :-1]}, "half the size"),
        ({"weight": lambda x: x.repeat_interleave(2, 1)[:, ::2]}, "weight"),
        ({"bias": lambda x: x.repeat_interleave(2)[::2]}, "bias"),
        ({name: lambda x: x.float() for name in ("feature", "weight", "bias", "top")}, "16-bit"),
        ({"feature": lambda x: x[:, :-1], "weight": lambda x: x[:, :-1]}, "feature"),
    ],
)
def test_what_is_left_to_the_other_kernels(changes: dict[str, Callable[[Tensor], Tensor]], reason: str) -> None:
    call = _call(TABLE["small"])
    out = torch.empty(2, call["weight"].shape[0], *call["feature"].shape[2:], dtype=call["feature"].dtype)
    call["out"] = out.contiguous(memory_format=NHWC)
    assert eligibility.lateral_connection_stationary(**call) is None
    call.update({name: change(call[name]) for name, change in changes.items()})
    assert reason in str(eligibility.lateral_connection_stationary(**call))


def _fitting(
    in_channels: int, feature: str, out: str, top: tuple[int, int] | None, out_channels: int = 256
) -> list[str]:
    """A call's tiles; maps of 80 x 160 pixels."""

    def empty(channels: int, size: tuple[int, int], layout: str) -> Tensor:
        shape = (1, channels, *size)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=FORMATS[layout])

    call = (
        *(empty(in_channels, (80, 160), feature), torch.empty(out_channels, in_channels, dtype=torch.bfloat16), None),
        *(None if top is None else empty(out_channels, top, out), empty(out_channels, (80, 160), out)),
    )
    return [str(config) for config in stationary.candidates(*call)]


def test_the_tiles_of_the_paper_s_levels() -> None:
    """As many output channels as the weight leaves room for; C5's, of 2,048 input channels, leaves too little."""
    large, medium, small = map(str, TABLE.values())
    assert {c: _fitting(c, "nhwc", "nhwc", (40, 80)) for c in (64, 256, 512, 1024, 2048)} == {
        **{64: [medium, small], 256: [large, medium, small], 512: [medium, small], 1024: [small], 2048: []}
    }
    assert _fitting(256, "nhwc", "nhwc", (40, 80), 64) == [small]
    # Its twin: NCHW, and a coarser map of another size.
    large, medium, small, medium_of_pixels, _ = map(str, stationary.FLAT_TABLE.values())
    assert _fitting(256, "nchw", "nchw", (40, 80)) == [medium_of_pixels, small]
    assert _fitting(512, "nchw", "nchw", (40, 80)) == [small]
    assert _fitting(256, "nchw", "nchw", (39, 80)) == []
    assert _fitting(256, "nchw", "nhwc", (40, 80)) == [medium, small]
    assert _fitting(256, "nchw", "nhwc", None) == [large, medium, small]
    assert _fitting(1024, "nhwc", "nhwc", (39, 77)) == [small]
    assert _fitting(256, "nhwc", "nchw", (40, 80)) == []
    assert _fitting(256, "nchw", "nhwc", (40, 80), 200) == []


# Results in NCHW are made of features in NCHW.
FLAT = [
    (*key, feature) for key in stationary.FLAT_TABLE for feature in FORMATS if (key[0], feature) != ("pixels", "nhwc")
]


@pytest.mark.parametrize(("axis", "size", "feature"), FLAT)
def test_every_flat_tile(axis: str, size: str, feature: str, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than tiles hold; coarser maps of half the size, of any, and none; the weight either way round."""
    config, layout = stationary.FLAT_TABLE[axis, size], AXES[axis]
    has_top = (axis, size) != ("channels", "large")
    for processors, in_channels, top_size, mode, link in (
        (1, 2 * config.depth - 24, (5, 12), "nearest", launching.ALONE),
        (3, 2 * config.depth, (3, 17), "nearest", launching.Link(follows=True)),
        (132, 2 * config.depth - 8, (11, 9), "nearest-exact", launching.ALONE),
    ):
        monkeypatch.setattr(geometry, "_DEFAULT_PROCESSORS", processors)
        call = _call(config, in_channels=in_channels, out_channels=2 * config.channels, height=10, width=24)
        call["feature"] = call["feature"].contiguous(memory_format=FORMATS[feature])
        size_of_top = (5, 12) if axis == "pixels" else top_size
        top = random_map((2, 2 * config.channels, *size_of_top), call["feature"].dtype, layout=layout)
        call["top"] = top if has_top else None
        result = _connect(config, call, 0.7 if has_top else 1.0, link, FORMATS[layout], mode)
        _check(result, call, 0.7, mode)
        alone = {**call, "bias": None, "top": None, "weight": _turned(call["weight"])}
        _check(_connect(config, alone, 1.0, layout=FORMATS[layout]), alone, 1.0)
    # Without a coarser map, any number of output channels.
    call = {**_call(config, height=4, width=8), "top": None}
    call["feature"] = call["feature"].contiguous(memory_format=FORMATS[feature])
    _check(_connect(config, call, 1.0, layout=FORMATS[layout]), call, 1.0)


@pytest.mark.parametrize("unproven", [True, False])
def test_autotuning_knows_the_tiles(unproven: bool, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FPN_KERNELS_AUTOTUNE=all measures this kernel's tiles beside the others; what it takes is what serves."""
    offered: list[Any] = []

    def fastest(operator: str, call: Any, tensor: Tensor, candidates: list[Any], default: Any, run: Any) -> Any:
        offered.extend(candidates)
        return candidates[-1]

    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "UNPROVEN", unproven)
    monkeypatch.setattr(autotune, "fastest", fastest)
    call = _call(TABLE["small"], in_channels=256, out_channels=256)
    out = torch.full((2, 256, *call["feature"].shape[2:]), float("nan"), dtype=call["feature"].dtype)
    call["out"] = out.contiguous(memory_format=NHWC)
    run = lateral_connection.plan(**call, mode="nearest")
    assert [each for each in offered if isinstance(each, StationaryConfig)] == (
        list(TABLE.values()) if unproven else []
    )
    if unproven:
        run(*call.values(), 1.0)
        _check(call["out"], call, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("size", TABLE)
def test_on_a_gpu(size: str) -> None:
    """Tails along every axis, views, no coarser map; the same bits every time, and from a captured graph."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is written for compute capability 9.0")
    config = TABLE[size]
    for changed in (
        {},
        {"height": 200, "width": 320, "in_channels": 256, "out_channels": 256},
        {"batch": 1, "height": 50},
    ):
        call = _call(config, "cuda", **changed)
        first = _connect(config, call, 0.7)
        _check(first, call, 0.7)
        for _ in range(20):
            assert torch.equal(_connect(config, call, 0.7), first)
        alone = {**call, "bias": None, "top": None, "weight": _turned(call["weight"])}
        _check(_connect(config, alone, 1.0), alone, 1.0)
    call = {**_call(config, "cuda", height=32, width=64)}
    call["feature"], call["top"] = call["feature"][:, :, 2:, :40], call["top"][:, :, 1:, :20]
    expected = _connect(config, call, 1.0)
    _check(expected, call, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _connect(config, call, 1.0)
    captured.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("axis", "size", "feature"), FLAT)
def test_flat_on_a_gpu(axis: str, size: str, feature: str) -> None:
    """The same of the tiles of pixels one after the other, at the size of C2 and with tails."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is written for compute capability 9.0")
    config, layout = stationary.FLAT_TABLE[axis, size], FORMATS[AXES[axis]]
    has_top = (axis, size) != ("channels", "large")
    for height, width in ((200, 320), (10, 24)):
        call = _call(config, "cuda", out_channels=2 * config.channels, height=height, width=width)
        call["feature"] = call["feature"].contiguous(memory_format=FORMATS[feature])
        call["top"] = call["top"].contiguous(memory_format=layout) if has_top else None
        for each in (call, {**call, "bias": None, "top": None, "weight": _turned(call["weight"])}):
            gain = 1.0 if each["top"] is None else 0.7
            first = _connect(config, each, gain, layout=layout)
            _check(first, each, gain)
            for _ in range(20):
                assert torch.equal(_connect(config, each, gain, layout=layout), first)


@pytest.mark.gpu
def test_a_pathway_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The levels that fit by this kernel, each launched while the one before it runs; the coarsest by the other."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is written for compute capability 9.0")
    plan, taken = lateral_connection.plan, []

    def planned(feature: Tensor, weight: Tensor, *rest: Any, link: Any) -> Any:
        fitting = stationary.candidates(feature, weight, *rest[:3])
        taken.append(bool(fitting))
        return plan(feature, weight, *rest, config=fitting[0] if fitting else None, link=link)

    monkeypatch.setattr(top_down_pathway.lateral_connection, "plan", planned)
    sizes, channels = ((200, 320), (100, 160), (50, 80), (25, 40)), (256, 512, 1024, 2048)
    features = [
        random_map((1, c, *s), torch.bfloat16, layout="nhwc").cuda() for c, s in zip(channels, sizes, strict=True)
    ]
    weights = [(torch.randn(256, c) / c**0.5).to(torch.bfloat16).cuda() for c in channels]
    biases = [torch.randn(256).to(torch.bfloat16).cuda() for _ in channels]
    arguments = (features, weights, biases, "nearest", 1.0, None)
    first = top_down_pathway.top_down_pathway(*arguments)
    assert taken == [True, True, True, False]
    for _ in range(30):
        for again, merged in zip(top_down_pathway.top_down_pathway(*arguments), first, strict=True):
            assert torch.equal(again, merged)
    top = None
    for level in (3, 2, 1, 0):
        call = {"feature": features[level], "weight": weights[level], "bias": biases[level], "top": top}
        _check(first[level], call, 1.0)
        top = first[level]
