"""The chained launches of `top_down_pathway` by Triton: right, in order, and without a deadlock."""

from __future__ import annotations

import heapq
import itertools
import math
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import oracle
import pytest
import torch
from native_calls import by_triton, plan_of, refusal_of
from samples import random_map
from targets import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import fpn_kernels
from benchmarks import no_launch
from fpn_kernels import reference
from fpn_kernels.gpu import autotune, availability, geometry

compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def _pathway(
    sizes: Sequence[tuple[int, int]],
    channels: Sequence[int],
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "nhwc",
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    features = [random_map((2, c, *size), dtype, device, layout) for c, size in zip(channels, sizes, strict=True)]
    weights = [torch.randn(width, c, device=device).div(c**0.5).to(dtype) for c in channels]
    return features, weights, [torch.randn(width, device=device).to(dtype) for _ in channels]


def _errors(arguments: Sequence[Any], merged: Sequence[Tensor], **options: Any) -> list[float]:
    exact = [[tensor.double().cpu() for tensor in group] for group in arguments]
    return [
        oracle.error(mine, theirs)
        for mine, theirs in zip(merged, reference.top_down_pathway(*exact, **options), strict=True)
    ]


@pytest.mark.interpreter
@pytest.mark.parametrize(("layout", "mode"), [("nhwc", "nearest"), ("nchw", "nearest-exact")])
def test_every_kernel_of_the_chain(layout: str, mode: str, poisoned: None) -> None:
    """Doubled sizes, an odd one, and one that shrinks; channels with a tail."""
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float32, 1e-6)):
        arguments = _pathway([(8, 16), (4, 8), (3, 8), (5, 16)], [16, 24, 8, 40], 24, dtype, layout)
        with fpn_kernels.use_backend("triton"):
            merged = fpn_kernels.top_down_pathway(*arguments, mode=mode, gain=0.5)
            assert fpn_kernels.explain("top_down_pathway", *arguments, mode=mode).backend == "triton"
        assert max(_errors(arguments, merged, mode=mode, gain=0.5)) <= tolerance


@pytest.fixture
def driver() -> Iterator[no_launch.Driver]:
    with no_launch.driver() as stand_in:
        yield stand_in


PAPER = [(200, 320), (100, 160), (50, 80), (25, 40)]


def _small(sizes: Sequence[tuple[int, int]]) -> Any:
    return _pathway(sizes, [16] * len(sizes), 16)


class _Chip:
    """Places the programs of chained launches on multiprocessors, in the order that CUDA promises and no better.

    Programs of a launch begin in any free place once every program of the launch before it has begun (all of them call
    `launch_dependents` first); each takes as long as it likes to multiply, and ends when the launch before it has
    ended, too.  A place is free again when its program has ended.
    """

    def __init__(self, grids: Sequence[int], places: int, choose: random.Random) -> None:
        self.waiting, self.ended = list(grids), list[int]()
        self.grids, self.free, self.choose = grids, places, choose
        self.multiplying: list[tuple[float, int]] = []
        self.done_multiplying = [0] * len(grids)
        self.left = list(grids)
        self.now = 0.0

    def _begin(self) -> None:
        for launch in range(len(self.grids)):
            if launch and self.waiting[launch - 1]:
                return
            while self.free and self.waiting[launch]:
                self.free -= 1
                self.waiting[launch] -= 1
                heapq.heappush(self.multiplying, (self.now + self.choose.random(), launch))

    def _finish(self) -> None:
        for launch in range(len(self.grids)):
            if launch and self.left[launch - 1]:
                return
            self.free += self.done_multiplying[launch]
            self.left[launch] -= self.done_multiplying[launch]
            self.ended += [launch] * self.done_multiplying[launch]
            self.done_multiplying[launch] = 0

    def run(self) -> bool:
        """Whether every program ends."""
        self._begin()
        while self.multiplying:
            self.now, launch = heapq.heappop(self.multiplying)
            self.done_multiplying[launch] += 1
            self._finish()
            self._begin()
        return not any(self.left)


@compiles
@pytest.mark.nightly
@pytest.mark.parametrize(
    "sizes", [PAPER, [(75, 113), (38, 57), (19, 29), (10, 15)], [(1, 1), (9, 200)], [(40, 40)], [(3, 5)] * 5], ids=str
)
def test_the_chain_ends_on_any_chip(
    sizes: Sequence[tuple[int, int]], driver: no_launch.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grids that are really launched, on one place to more than there are programs."""
    for processors in (1, 2, 7, 108, 132, 148):
        monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", processors)
        driver.launched.clear()
        by_triton("top_down_pathway", *_small(sizes), [*range(len(sizes))])
        grids = [math.prod(grid) for _, grid, _ in driver.launched]
        assert len(grids) == len(sizes) and min(grids) > 0
        for resident, seed in itertools.product((1, 2, 8), range(3)):
            chip = _Chip(grids, processors * resident, random.Random(seed))
            assert chip.run()
            assert chip.ended == sorted(chip.ended) and len(chip.ended) == sum(grids)


def test_the_model_of_the_chip_can_stand_still() -> None:
    """A launch that need not wait for the one before it to begin takes all the places, and waits in them for ever."""

    class Careless(_Chip):
        def _begin(self) -> None:
            for launch in reversed(range(len(self.grids))):
                while self.free and self.waiting[launch]:
                    self.free -= 1
                    self.waiting[launch] -= 1
                    heapq.heappush(self.multiplying, (self.now, launch))

    assert not Careless([2, 2], 2, random.Random(0)).run()
    assert _Chip([2, 2], 2, random.Random(0)).run()


@compiles
def test_autotuning_times_tops_that_have_memory(
    driver: no_launch.Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_answers", {})
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "_device_name", lambda tensor: "Some GPU")
    monkeypatch.setattr(autotune, "milliseconds", lambda run: (run(), 1.0)[1])
    plan_of("triton", "top_down_pathway", *_small([(16, 16), (8, 8)]), [0, 1])
    tensors = [each for _, _, arguments in driver.launched for each in arguments if isinstance(each, Tensor)]
    assert len(driver.launched) >= 4 and tensors and not [each for each in tensors if each.is_meta]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "tensor_refusal", lambda tensor: None)
    arguments = _small([(4, 4), (2, 2)])
    assert refusal_of("triton", "top_down_pathway", *arguments, [0, 1]) is None
    assert "two launches" in str(refusal_of("triton", "top_down_pathway", *arguments, [0, 1], "bilinear"))
    monkeypatch.setattr(availability, "MAX_SIDE", 3)
    assert "level 0: a side of 4" in str(refusal_of("triton", "top_down_pathway", *arguments, [0, 1]))

    class OnGpu:
        is_cuda = True

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    # Numbers of devices that no other test has: what a device can do is remembered.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: {98: (8, 6), 99: (9, 0)}[index])
    assert "9.0" in str(availability.overlap_refusal(OnGpu(98)))  # type: ignore[arg-type]
    assert availability.overlap_refusal(OnGpu(99)) is None  # type: ignore[arg-type]


@pytest.fixture
def hopper() -> None:
    """A GPU on which launches overlap."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("launches overlap on compute capability 9.0 and later")


def _chained(arguments: Any) -> tuple[Tensor, ...]:
    with fpn_kernels.use_backend("triton"):
        result: tuple[Tensor, ...] = fpn_kernels.top_down_pathway(*arguments)
    return result


def _one_by_one(arguments: Any) -> list[Tensor]:
    features, weights, biases = arguments
    top, merged = None, []
    with fpn_kernels.use_backend("triton"):
        for level in reversed(range(len(features))):
            top = fpn_kernels.lateral_connection(features[level], weights[level], biases[level], top)
            merged.append(top)
    return merged[::-1]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_overlapping_launches_give_the_same_bits(layout: str, hopper: None) -> None:
    """Again and again, in memory that was just freed, and poisoned: an early read or write would show now and then."""
    for sizes in (PAPER, [(75, 113), (38, 57), (19, 29), (10, 15)]):
        for _ in range(50):
            arguments = _pathway(sizes, [256, 512, 1024, 2048], 256, layout=layout, device="cuda")
            expected = _one_by_one(arguments)
            poison = [torch.full_like(each, float("nan")) for each in expected]
            del poison
            for mine, theirs in zip(_chained(arguments), expected, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_a_captured_chain_replays(hopper: None) -> None:
    arguments = _pathway(PAPER, [256, 512, 1024, 2048], 256, device="cuda")
    _chained(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = _chained(arguments)
    for _ in range(20):
        for feature in arguments[0]:
            feature.copy_(torch.randn_like(feature))
        graph.replay()
        for mine, theirs in zip(merged, _one_by_one(arguments), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_chains_on_two_streams_at_once(hopper: None) -> None:
    calls = [_pathway(PAPER, [256, 512, 1024, 2048], 256, device="cuda") for _ in range(2)]
    expected = [_one_by_one(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(_chained(call))
        torch.cuda.synchronize()
        for merged, theirs in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(merged, theirs, strict=True))
