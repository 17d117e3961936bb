"""`experiments.stationary` against float64, emulated on the CPU (`gluon_emulation`)."""

from __future__ import annotations

import inspect
import random
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gluon_emulation import DeadlockError, emulate
from maps import FORMATS, check, filled
from stationary_calls import LAYOUTS, TILES, alone, connect, make_call
from torch import Tensor

from experiments.stationary import kernels
from experiments.stationary import launch as stationary
from experiments.stationary.launch import FLAT_TABLE, TABLE, StationaryConfig
from fpn_kernels.gpu import geometry
from fpn_kernels.gpu.launch import ALONE, Link


class _Emulated:
    """Replaces `Launch`: the same kernel, grid and arguments, emulated."""

    previous_ends: Callable[[], None] = staticmethod(lambda: None)
    module: Any = None  # None: the module of the kernel

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: Any, constants: Any, like: Tensor) -> None:
        self.names, self.grid, self.numbers, self.constants = kernel.arg_names, grid, numbers, constants
        self.module = self.module or sys.modules[kernel.fn.__module__]

    def __call__(self, *leading: Any) -> None:
        known = (*leading, *self.numbers)
        arguments = (*known, *(self.constants[name] for name in self.names[len(known) :]))
        seed = random.randrange(1 << 30)
        emulate(self.module, "connect", self.grid[0], arguments, seed=seed, previous_ends=self.previous_ends)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> type[_Emulated]:
    class Emulated(_Emulated):
        pass

    monkeypatch.setattr(stationary, "Launch", Emulated)
    return Emulated


@pytest.mark.parametrize("sms", [1, 3, 132])
@pytest.mark.parametrize("size", TABLE)
def test_every_tile(size: str, sms: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one SM, which computes all tiles, on three, and on more than there are tiles."""
    monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", sms)
    call = make_call(TABLE[size])
    connect(TABLE[size], call, 0.7)
    connect(TABLE[size], alone(call))


@pytest.mark.parametrize(("config", "feature", "layout", "has_top"), [tile for tile in TILES if tile[0].flat], ids=str)
def test_every_flat_tile(
    config: StationaryConfig, feature: str, layout: str, has_top: bool, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More pixels than tiles hold; coarser maps of half the size, of any, and none; either weight."""
    for sms, missing, top, mode, link in (
        (1, 24, (5, 12), "nearest", ALONE),
        (3, 0, (3, 17), "nearest", Link(follows=True)),
        (132, 8, (11, 9), "nearest-exact", ALONE),
    ):
        monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", sms)
        sizes = {"in_channels": 2 * config.depth - missing, "out_channels": 2 * config.channels}
        size_of_top = None if not has_top else (5, 12) if layout == "nchw" else top
        call = make_call(config, layouts=(feature, layout), **sizes, height=10, width=24, top=size_of_top)
        connect(config, call, 0.7 if has_top else 1.0, layout, mode, link)
        connect(config, alone(call), layout=layout)
    # Without a coarser map, any number of output channels.
    connect(config, make_call(config, layouts=(feature, layout), height=4, width=8, top=None), layout=layout)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 16])
def test_chunks_use_the_ring_in_turn(chunks: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer chunks than slots, as many, and more."""
    monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", 1)
    for in_channels in (64 * chunks, 64 * chunks - 56):
        call = make_call(TABLE["small"], in_channels=in_channels, out_channels=64, height=12, width=32)
        connect(TABLE["small"], call, -1.5)


def test_views(emulated: Any) -> None:
    """Crops of larger maps, whose rows are further apart; maps of one row and of one column."""
    config = TABLE["small"]
    call = make_call(config, height=8, width=12)
    call["feature"], call["top"] = call["feature"][:, 8:72, 2:, :8], call["top"][:, :, 1:, :4]
    call["weight"] = call["weight"][:, :64]
    connect(config, call)
    for height, width in ((1, 1), (1, 24), (9, 1)):
        connect(config, make_call(config, height=height, width=width, top=None))


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        *((config, "nhwc") for config in TABLE.values()),
        *((FLAT_TABLE[axis, "medium"], layout) for axis, layout in LAYOUTS.items()),
    ],
    ids=str,
)
def test_overlap_with_the_previous_launch(config: StationaryConfig, layout: str, emulated: Any) -> None:
    """Until the previous launch ends, the coarser map is not written, and the result's memory may still be read."""
    call = make_call(config, layouts=(layout, layout), out_channels=2 * config.channels, height=10, width=24)
    coarse, out = call["top"].clone(), filled(7.0, call["feature"], 2 * config.channels, layout)
    call["top"].fill_(float("nan"))
    untouched: list[bool] = []

    def ends() -> None:
        untouched.append(bool((out == 7.0).all()))
        call["top"].copy_(coarse)

    emulated.previous_ends = staticmethod(ends)
    link = Link(follows=True, leads=True)
    stationary.plan(config, **call, out=out, link=link)(**call, out=out, gain=1.0)
    assert untouched[0], "the result was written before the previous launch had ended"
    check(out, call, "nearest", 1.0)


def _broken(function: str, old: str, new: str) -> types.ModuleType:
    """The module of the kernels, with a line of one function replaced."""
    module = types.ModuleType("broken")
    vars(module).update(vars(kernels))
    source = textwrap.dedent(inspect.getsource(getattr(kernels, function).fn))
    assert old in source, f"{function} has no line {old!r} any more"
    source = "\n".join(line for line in source.replace(old, new).split("\n") if not line.startswith("@"))
    names = dict(vars(kernels))
    exec(compile("from __future__ import annotations\n" + source, function, "exec"), names)
    setattr(module, function, types.SimpleNamespace(fn=names[function]))
    return module


@pytest.mark.parametrize(
    ("function", "removed"),
    [
        # Pixels are multiplied before they arrive, or overwritten before they are multiplied.
        ("multiply", "mbarrier.wait(full.index(slot), ((begin + k) // STAGES) & 1)"),
        ("load_features", "mbarrier.wait(free.index(slot), (chunk // STAGES + 1) & 1)"),
        # The coarse pixels are those of the previous tile, or of the next.
        ("multiply", "mbarrier.wait(top_full.index(GROUP), (count // GROUPS) & 1)"),
        ("load_tops", "mbarrier.wait(free.index(slot), (count // GROUPS + 1) & 1)"),
        # The weight; the last product; the bulk copy of the result; its fence.
        ("multiply", "mbarrier.wait(weight_full.index(k), 0)"),
        ("multiply", "total = warpgroup_mma_wait(0, deps=[total])"),
        ("multiply", "tma.store_wait(0)"),
        ("multiply", "fence_async_shared()"),
        ("multiply", "mbarrier.arrive(top_free.index(GROUP), count=1)"),
        ("multiply", "mbarrier.arrive(free.index((begin + k - 1) % STAGES), count=1)"),
        ("multiply", "mbarrier.arrive(free.index(last), count=1)"),
        # Without the turns, one parity stands for two phases.
        ("multiply", "mbarrier.wait(turns.index(GROUP), (count // GROUPS + 1 - GROUP) & 1)"),
        ("multiply", "mbarrier.arrive(turns.index(1 - GROUP), count=1)"),
    ],
)
def test_each_wait_and_arrival_is_needed(
    function: str, removed: str, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one of its waits and arrivals the kernel is wrong or deadlocks, and the emulation shows it."""
    monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", 1)
    sizes = {"batch": 1, "in_channels": 320, "out_channels": 64, "height": 24, "width": 48}
    connect(TABLE["small"], make_call(TABLE["small"], **sizes))
    emulated.module = _broken(function, removed, "pass")
    with pytest.raises(AssertionError):
        for _ in range(60):  # the order of events is random
            connect(TABLE["small"], make_call(TABLE["small"], **sizes))


def test_a_deadlock_is_reported(emulated: Any) -> None:
    emulated.module = _broken("load_tops", "for tile in range(first, tiles, step):", "for tile in range(0):")
    with pytest.raises(DeadlockError, match="multiply"):
        connect(TABLE["small"], make_call(TABLE["small"]))


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
def test_refusals(changes: dict[str, Callable[[Tensor], Tensor]], reason: str) -> None:
    call = make_call(TABLE["small"])
    out = filled(0.0, call["feature"], call["weight"].shape[0])
    assert stationary.refusal(**call, out=out) is None
    call.update({name: change(call[name]) for name, change in changes.items()})
    assert reason in str(stationary.refusal(**call, out=out))


def _fitting(in_channels: int, feature: str, out: str, top: Any, out_channels: int = 256) -> list[Any]:
    """The tiles of a call with maps of 80 x 160 pixels."""

    def empty(channels: int, size: tuple[int, int], layout: str) -> Tensor:
        shape = (1, channels, *size)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=FORMATS[layout])

    weight = torch.empty(out_channels, in_channels, dtype=torch.bfloat16)
    coarse = None if top is None else empty(out_channels, top, out)
    maps = (empty(in_channels, (80, 160), feature), weight, None, coarse, empty(out_channels, (80, 160), out))
    return stationary.candidates(*maps)


def test_tiles_of_the_levels_of_the_paper() -> None:
    """A tile has as many output channels as shared memory has space for; C5's weight, of 2,048 rows, fits none."""
    large, medium, small = TABLE.values()
    assert {c: _fitting(c, "nhwc", "nhwc", (40, 80)) for c in (64, 256, 512, 1024, 2048)} == {
        **{64: [medium, small], 256: [large, medium, small], 512: [medium, small], 1024: [small], 2048: []}
    }
    assert _fitting(256, "nhwc", "nhwc", (40, 80), 64) == [small]
    large, medium, small, medium_of_pixels, small_of_pixels = FLAT_TABLE.values()
    assert _fitting(256, "nchw", "nchw", (40, 80)) == [medium_of_pixels, small_of_pixels]
    assert _fitting(512, "nchw", "nchw", (40, 80)) == [small_of_pixels]
    assert _fitting(256, "nchw", "nchw", (39, 80)) == []
    assert _fitting(256, "nchw", "nhwc", (40, 80)) == [medium, small]
    assert _fitting(256, "nchw", "nhwc", None) == [large, medium, small]
    assert _fitting(1024, "nhwc", "nhwc", (39, 77)) == [small]
    assert _fitting(256, "nhwc", "nchw", (40, 80)) == []
    assert _fitting(256, "nchw", "nhwc", (40, 80), 200) == []
