"""The measurement of a row: checks against eager, and clocks on a GPU that is simulated here."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fpn_kernels
from benchmarks import clock, measure, providers, workloads
from benchmarks.cases import FORWARD, LIBRARY, TINY, TRAINING, Case, Spot
from benchmarks.measure import WrongResultError, check

CPU = torch.device("cpu")


def test_check_accepts_rounding_and_nothing_else() -> None:
    want = torch.linspace(-4, 4, 64, dtype=torch.bfloat16)
    near = want + torch.tensor(0.015625, dtype=torch.bfloat16)
    check([near], [want])
    check([want * 1.02], [want], roundings=4)
    check([want * 1.05], [want], sizes={0: 100.0})  # a difference of two sums of a hundred, which cancel
    check([near.float()], [want.float()], computed=torch.bfloat16)
    for got, options, message in (
        ([near], {"exact": True}, "differs from eager in"),
        ([near.float()], {}, "float32"),
        ([want * 1.05], {}, "is off by"),
        ([want * 1.05], {"roundings": 4}, "allowed is 0.031 of it"),
        ([want * float("nan")], {}, "is off by nan"),
        ([], {}, "0 results where eager gives 1"),
    ):
        with pytest.raises(WrongResultError, match=message):
            check(got, [want], **options)


def _case(
    operator: str = "upsample_add", direction: str = FORWARD, level: int | None = None, dtype: str = "fp32"
) -> Case:
    return Case(operator, direction, Spot(TINY, level), 1, dtype, "NHWC")


def _row(case: Case, provider: str = LIBRARY) -> dict[str, Any]:
    return measure.row(case, providers.named(provider), CPU, 0.001)


@pytest.mark.parametrize("case", [_case(), _case("neck", TRAINING), _case("neck", TRAINING, dtype="amp-bf16")], ids=str)
def test_a_row_has_its_figures(case: Case) -> None:
    found = _row(case)
    assert found["bytes"] > 0 and found["flops"] > 0 and found["served_by"]
    assert found["caller"]["rounds"] >= 3 and found["caller"]["ratio"] > 0 and found["host"]["own"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fpn_kernels.upsample_add
    monkeypatch.setattr(fpn_kernels, "upsample_add", lambda *tensors, **options: right(*tensors, **options) + 1e-6)
    with pytest.raises(WrongResultError, match="differs from eager in"):
        _row(_case())


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fpn_kernels.lateral_connection

    def wrong(feature: torch.Tensor, *others: torch.Tensor, **options: Any) -> torch.Tensor:
        # The value is right; the gradient of the feature is doubled.
        return right(2 * feature - feature.detach(), *others, **options)

    monkeypatch.setattr(fpn_kernels, "lateral_connection", wrong)
    with pytest.raises(WrongResultError, match="result 0 is off by"):
        _row(_case("lateral_connection", TRAINING, 2))


def test_a_provider_that_is_not_here_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with pytest.raises(providers.NotMeasuredError, match="none of /nonexistent/compiler is here"):
        _row(_case(), "torch.compile")
    if "triton" not in fpn_kernels.available_backends():
        with pytest.raises(providers.NotMeasuredError, match="backend 'triton' is not available here"):
            _row(_case(), f"{LIBRARY}/triton")


def test_a_candidate_is_checked_and_timed_against_the_library() -> None:
    def time(call: Any) -> dict[str, Any]:
        return measure.row(_case(), providers.Provider("mine", candidate=call), CPU, 0.001)

    eager = workloads.workload(_case(), CPU).eager.call
    assert time(eager)["caller"]["ratio"] > 0 and time(eager)["served_by"] == {}
    with pytest.raises(WrongResultError):
        time(lambda *tensors: [2 * each for each in eager(*tensors)])


@pytest.mark.parametrize("operator", ["upsample_add", "lateral_connection", "output_conv"])
def test_all_levels_are_the_levels_one_by_one(operator: str) -> None:
    whole = workloads.workload(_case(operator), CPU)
    parts = [workloads.workload(case, CPU) for case in workloads.each_level(_case(operator))]
    assert len(parts) == (3 if operator == "upsample_add" else 4)
    assert whole.cost.bytes == sum(part.cost.bytes for part in parts)
    expected = [tensor for part in parts for tensor in workloads.tensors(part.eager.call(*part.inputs))]
    for contender in (whole.eager, whole.fused):
        for got, want in zip(contender.call(*whole.inputs), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_the_summary_of_rounds_is_pair_by_pair() -> None:
    found = measure.summary([{"own": 1.0, "eager": 2.0}, {"own": 4.0, "eager": 8.0}, {"own": 1.0, "eager": 3.0}])
    assert found == {"own": 1.0, "eager": 3.0, "ratio": 2.0, "spread": 0.25, "rounds": 3}
    assert "ratio" not in measure.summary([{"own": 1.0}, {"own": 2.0}])


class Simulated:
    """A device with a clock of its own: a captured call takes 20 us at each replay, a launch 15 us of the host's."""

    def __init__(self) -> None:
        self.now, self.asleep_until = 0.0, 0.0
        self.capturing = False
        self.calls: list[int] = []

    def call(self, number: int) -> torch.Tensor:
        self.calls.append(number)
        self.now += 0.0 if self.capturing else 20e-6
        return torch.zeros(1)

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        before, self.capturing = len(self.calls), True
        yield
        self.capturing, graph.calls = False, len(self.calls) - before

    def sleep(self, cycles: int) -> None:
        self.asleep_until = self.now + cycles / 2e9


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    simulated = Simulated()

    class Graph:
        calls = 0

        def replay(self) -> None:
            simulated.now = max(simulated.now + 15e-6, simulated.asleep_until) + 20e-6 * self.calls

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = max(simulated.now, simulated.asleep_until)

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            return (other.at - self.at) * 1e3

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": simulated.capture,
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda *device: None,
        "_sleep": simulated.sleep,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return simulated


def test_a_replay_gives_the_time_of_one_call_without_the_launch(device: Simulated) -> None:
    timer = clock.GraphTimer([functools.partial(device.call, number) for number in range(3)], estimate=20e-6)
    assert timer.count % 3 == 0 and 45 <= timer.count <= 64  # about a millisecond, in whole turns
    assert device.calls[-timer.count :] == [0, 1, 2] * (timer.count // 3)
    assert timer.seconds() == pytest.approx(20e-6, rel=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_cannot_be_captured_is_timed_by_events(device: Simulated, fails: bool) -> None:
    def own(*inputs: torch.Tensor) -> torch.Tensor:
        if fails and device.capturing:
            device.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        return device.call(1)

    def by_events(call: Any, queue_ahead: float) -> float:
        before = device.now
        call()
        return device.now - before + 5e-6

    calls = {"eager": lambda *inputs: (device.call(2), device.call(2)), "own": own}
    once = {name: functools.partial(call) for name, call in calls.items()}
    simulated = types.SimpleNamespace(cache_bytes=1024, device_seconds=by_events)
    work = types.SimpleNamespace(inputs=(torch.randn(8),))
    found = measure._time_device(simulated, work, calls, once, 1e-4, 1e-3)  # type: ignore[arg-type]
    assert found["method"] == ("events" if fails else "graph")
    assert found["device"]["own"] == pytest.approx(25e-6 if fails else 20e-6, rel=1e-2)


def test_input_sets_outgrow_the_cache_and_keep_their_form() -> None:
    nhwc = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    inputs = (nhwc, torch.randn(3, requires_grad=True))
    sets = clock.input_sets(inputs, cache_bytes=1024)
    assert len(sets) == 4 and sets[0] is inputs  # 1036 bytes each: four caches' worth
    assert len({tensor.data_ptr() for one in sets for tensor in one}) == 8
    assert all(one[0].stride() == nhwc.stride() and one[1].is_leaf and one[1].requires_grad for one in sets)


@pytest.mark.gpu
def test_a_copy_takes_by_graph_what_it_takes_by_events() -> None:
    timer = clock.Clock(torch.device("cuda"))
    source = torch.randn(64 << 20, device="cuda")
    by_events = min(timer.device_seconds(source.clone, 1e-3) for _ in range(5))
    graph = clock.GraphTimer([one[0].clone for one in clock.input_sets((source,), timer.cache_bytes)], by_events)
    assert min(graph.seconds() for _ in range(5)) == pytest.approx(by_events, rel=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "amp-fp16"])
def test_a_row_on_the_gpu(dtype: str) -> None:
    case = Case("neck", TRAINING, Spot(TINY), 1, dtype, "NHWC")
    found = measure.row(case, providers.named(LIBRARY), torch.device("cuda"), 0.1)
    assert found["method"] == "graph", found.get("method_reason")
    assert 0 < found["device"]["own"] < found["caller"]["own"] and found["peak_bytes"]["own"] > 0
