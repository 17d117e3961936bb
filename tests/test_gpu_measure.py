"""How the GPU run times a row: graphs of many calls on inputs that take turns, on a GPU that is simulated here."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fpn_kernels
from benchmarks import providers, replay
from benchmarks.cases import CHAINED, COMPILE, EAGER, FORWARD, LIBRARY, MAX_AUTOTUNE, TINY, TRAINING, Case, Spot
from benchmarks.gpu import measure, rows, smoke, worker, workloads
from benchmarks.harness import Prepared
from benchmarks.workloads import tensors
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.dispatch import Backend, Implementation

CPU = torch.device("cpu")


class Simulated:
    """A device with a clock of its own: a captured call takes 20 us at each replay, a launch 15 us of the host's."""

    def __init__(self) -> None:
        self.now, self.asleep_until = 0.0, 0.0
        self.capturing = False
        self.calls: list[int] = []

    def call(self, number: int) -> torch.Tensor:
        self.calls.append(number)
        if not self.capturing:
            self.now += 20e-6
        return torch.zeros(1)

    def graph_of(self) -> Any:
        device = self

        class Graph:
            calls = 0

            def replay(self) -> None:
                device.now = max(device.now + 15e-6, device.asleep_until) + 20e-6 * self.calls

        return Graph

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        before, self.capturing = len(self.calls), True
        yield
        self.capturing, graph.calls = False, len(self.calls) - before

    def event_of(self) -> Any:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                # Behind a sleep, an event is reached when the sleep is over.
                self.at = max(device.now, device.asleep_until)

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e3

        return Event

    def sleep(self, cycles: int) -> None:
        self.asleep_until = self.now + cycles / 2e9


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    simulated = Simulated()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": simulated.graph_of(),
        "graph": simulated.capture,
        "Event": simulated.event_of(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda *device: None,
        "_sleep": simulated.sleep,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return simulated


def test_a_replay_gives_the_time_of_one_call_without_the_launch(device: Simulated) -> None:
    calls = [functools.partial(device.call, number) for number in range(3)]
    timer = replay.GraphTimer(calls, estimate=20e-6)
    assert timer.count % 3 == 0 and 45 <= timer.count <= 64  # about a millisecond, in whole turns
    captured = device.calls[-timer.count :]
    assert captured == [0, 1, 2] * (timer.count // 3)
    assert timer.seconds() == pytest.approx(20e-6, rel=1e-3)


@pytest.mark.parametrize(("estimate", "sets", "count"), [(1.0, 2, 2), (1e-9, 2, 64), (1e-9, 5, 60), (1e-4, 4, 12)])
def test_a_graph_is_long_enough_and_not_longer(device: Simulated, estimate: float, sets: int, count: int) -> None:
    calls = [functools.partial(device.call, number) for number in range(sets)]
    assert replay.GraphTimer(calls, estimate).count == count


def test_results_of_one_turn_stay_alive(device: Simulated) -> None:
    alive: set[int] = set()
    most = 0

    class Result:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    replay.GraphTimer([Result] * 4, estimate=20e-6)
    assert most == 4


def test_input_sets_outgrow_the_cache_and_keep_their_form() -> None:
    nhwc = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    inputs = (nhwc, torch.randn(3, requires_grad=True))
    sets = replay.input_sets(inputs, cache_bytes=1024)
    assert len(sets) == 4 and sets[0] is inputs  # 1036 bytes each: four caches' worth
    pointers = {tensor.data_ptr() for one in sets for tensor in one}
    assert len(pointers) == 8
    for one in sets[1:]:
        assert one[0].stride() == nhwc.stride() and torch.equal(one[0], nhwc)
        assert one[1].is_leaf and one[1].requires_grad and not one[0].requires_grad
    assert len(replay.input_sets(inputs, cache_bytes=0)) == 2
    assert len(replay.input_sets(inputs, cache_bytes=1 << 30)) == 16


class _Clock:
    """A clock of the simulated device."""

    on_gpu, cache_bytes = True, 1024

    def __init__(self, device: Simulated) -> None:
        self.device = device

    def device_seconds(self, call: Callable[[], Any], queue_ahead: float) -> float:
        before = self.device.now
        call()
        return self.device.now - before + 5e-6


@pytest.mark.parametrize("fails", [False, True])
def test_what_cannot_be_captured_is_timed_by_events(device: Simulated, fails: bool) -> None:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        if fails and device.capturing:
            device.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        return device.call(1)

    work = types.SimpleNamespace(inputs=(torch.randn(8),))
    ready = Prepared(run, lambda *inputs: (device.call(2), device.call(2)), {})
    once = {"eager": lambda: ready.eager(), "own": lambda: ready.run()}
    result = measure._time_device(_Clock(device), work, ready, once, 1e-4)  # type: ignore[arg-type]
    assert result["method"] == ("events" if fails else "graph")
    assert ("not permitted" in result.get("method_reason", "")) == fails
    assert result["device"]["own"] == pytest.approx(25e-6 if fails else 20e-6, rel=1e-2)
    assert result["device"]["ratio"] == pytest.approx(45 / 25 if fails else 2, rel=1e-2)


def test_summary_of_rounds_is_pair_by_pair() -> None:
    found = measure._summary([{"own": 1.0, "eager": 2.0}, {"own": 4.0, "eager": 8.0}, {"own": 1.0, "eager": 3.0}])
    assert found == {"own": 1.0, "eager": 3.0, "ratio": 2.0, "spread": 0.25, "rounds": 3}


@pytest.mark.gpu
def test_a_copy_takes_by_graph_what_it_takes_by_events() -> None:
    from benchmarks.clock import Clock

    clock = Clock(torch.device("cuda"))
    source = torch.randn(64 << 20, device="cuda")
    by_events = min(clock.device_seconds(source.clone, 1e-3) for _ in range(5))
    sets = replay.input_sets((source,), clock.cache_bytes)
    timer = replay.GraphTimer([one[0].clone for one in sets], by_events)
    assert min(timer.seconds() for _ in range(5)) == pytest.approx(by_events, rel=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
def test_a_row_on_the_gpu(direction: str) -> None:
    case = Case("neck", direction, Spot(TINY), 1, "bf16", "NHWC")
    row = measure.measure(case, measure.provider_named(LIBRARY), torch.device("cuda"))
    assert row["method"] == "graph", row.get("method_reason")
    assert 0 < row["device"]["own"] < row["caller"]["own"] and row["device"]["rounds"] >= 5
    assert (row["peak_bytes"]["own"] > 0) if direction == TRAINING else ("peak_bytes" not in row)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_library_is_measured_before_its_rivals_and_nothing_twice() -> None:
    plan = rows.Plan(providers=(EAGER, COMPILE, LIBRARY, f"{LIBRARY}/native", f"{LIBRARY}/triton"))
    headline, others = plan.headline(), plan.others()
    units = [*headline, *plan.max_autotune(), *others]
    names = [unit["id"] for unit in units]
    assert len(set(names)) == len(names)
    for part in (headline, others):
        order = [unit["provider"] for unit in part]
        assert order.index(COMPILE) > max(i for i, name in enumerate(order) if name.startswith(LIBRARY))
    assert {(u["dtype"], u["layout"]) for u in headline} == {("bf16", "NHWC")}
    assert {(u["dtype"], u["layout"]) for u in others} == {
        *(("bf16", "NCHW"), ("fp16", "NHWC"), ("fp16", "NCHW"), ("fp32", "NHWC"), ("fp32", "NCHW"))
    }
    assert {unit["batch"] for unit in units} == {1, 8}
    assert {unit["provider"] for unit in others} == {COMPILE, LIBRARY, f"{LIBRARY}/native", f"{LIBRARY}/triton"}
    assert all(str(rows.case_of(unit)) == unit["case"] for unit in units)


def test_without_a_compiler_there_are_no_rivals() -> None:
    plan = rows.Plan(providers=(EAGER, LIBRARY))
    assert plan.max_autotune() == [] and {unit["provider"] for unit in plan.headline()} == {LIBRARY}


@pytest.mark.parametrize("operator", ["upsample_add", "lateral_connection", "output_conv"])
def test_all_levels_are_the_levels_one_by_one(operator: str) -> None:
    case = Case(operator, FORWARD, Spot(TINY), 1, "fp32", "NHWC")
    whole = workloads.workload(case, CPU)
    levels = (2, 3, 4) if operator == "upsample_add" else (2, 3, 4, 5)
    parts = [workloads.workload(Case(operator, FORWARD, Spot(TINY, n), 1, "fp32", "NHWC"), CPU) for n in levels]
    assert (whole.cost.bytes, whole.cost.flops) == tuple(
        sum(getattr(part.cost, name) for part in parts) for name in ("bytes", "flops")
    )
    for results in (whole.eager.call(*whole.inputs), whole.fused.call(*whole.inputs)):
        one_by_one = [tensor for part in parts for tensor in tensors(part.eager.call(*part.inputs))]
        for got, want in zip(results, one_by_one, strict=True):
            torch.testing.assert_close(got, want)


def test_a_provider_is_known_by_its_name() -> None:
    assert measure.provider_named(LIBRARY).backend is None and measure.provider_named(LIBRARY).fused
    assert measure.provider_named(f"{LIBRARY}/triton").backend == "triton"
    assert measure.provider_named(COMPILE).compile_mode == "default"
    assert measure.provider_named(MAX_AUTOTUNE).compile_mode == "max-autotune-no-cudagraphs"
    assert measure.provider_named(CHAINED).backend is None
    assert measure.provider_named(CHAINED).unforced == ("top_down_pathway",)
    with pytest.raises(ValueError, match="name: expected 'torch.compile'"):
        measure.provider_named("tensorrt")


def test_a_provider_may_choose_what_is_otherwise_to_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chained pathway, where Triton is here, with everything else as the library chooses it."""
    chained = Implementation(
        lambda *a: lambda *b: ["as a whole"], lambda *a: None, only_forced=lambda *a: "not measured"
    )
    backend = Backend("chaining", lambda: None, {"top_down_pathway": chained, "output_conv": chained})
    monkeypatch.setattr(dispatch, "_registry", {"chaining": backend, **dispatch._registry})
    maps, weight, taps = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)], torch.ones(2, 2), torch.ones(2, 2, 3, 3)

    def served() -> list[str]:
        with dispatch.record_calls() as calls:
            fpn_kernels.top_down_pathway(maps, [weight, weight])
            fpn_kernels.output_conv(maps[0], taps)
        return [name for name, backend in calls if backend == "chaining"]

    before = dispatch.backends()
    assert served() == []
    with measure.provider_named(CHAINED).selected():
        assert served() == ["top_down_pathway"]
        assert [each.name for each in dispatch.backends()] == [each.name for each in before]
    assert served() == [] and dispatch.backends() == before


def test_the_neck_is_measured_with_the_chain_where_triton_is() -> None:
    units = rows.Plan(providers=(LIBRARY, f"{LIBRARY}/triton")).headline()
    chained = {(unit["operator"], unit["direction"], unit["batch"]) for unit in units if unit["provider"] == CHAINED}
    assert chained == {("neck", direction, batch) for direction in (FORWARD, TRAINING) for batch in (1, 8)}
    assert CHAINED not in {unit["provider"] for unit in rows.Plan(providers=(LIBRARY,)).headline()}


# --- the worker ------------------------------------------------------------------------------------------------------


def _unit(provider: str = LIBRARY, operator: str = "upsample_add") -> rows.Unit:
    units = rows.Plan(tiny=True, providers=(COMPILE, LIBRARY, f"{LIBRARY}/triton")).headline()
    return next(unit for unit in units if unit["operator"] == operator and unit["provider"] == provider)


def test_a_wrong_result_has_a_reason_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fpn_kernels.upsample_add
    monkeypatch.setattr(fpn_kernels, "upsample_add", lambda top, lateral, **options: right(top, lateral) * 1.01)
    result = worker.execute(_unit(), CPU)
    assert result["status"] == "failed" and "WrongResultError" in result["reason"] and "caller" not in result
    result = worker.execute(rows.smoke(True, [])[0], CPU)
    assert result["status"] == "failed" and "not the float64 sum" in result["reason"]


def test_smoke_sees_what_is_wrong_in_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fpn_kernels.lateral_connection
    unit = next(unit for unit in rows.smoke(True, []) if unit["operator"] == "lateral_connection")
    assert worker.execute(unit, CPU)["status"] == "ok"

    def wrong(feature: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        # The value is right; the gradient of feature is doubled.
        return right(2 * feature - feature.detach(), *others)

    monkeypatch.setattr(fpn_kernels, "lateral_connection", wrong)
    assert "gradient of input 0: error" in worker.execute(unit, CPU)["reason"]


def test_smoke_sees_nan_and_what_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fpn_kernels.output_conv
    unit = next(unit for unit in rows.smoke(True, []) if unit["operator"] == "output_conv")

    def wrong(feature: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        result = right(feature, *others)
        mask = torch.zeros_like(result)
        mask[0, 0, 0, 0] = float("nan")
        return result + mask

    monkeypatch.setattr(fpn_kernels, "output_conv", wrong)
    assert "result 0: error inf" in worker.execute(unit, CPU)["reason"]


@pytest.mark.skipif("triton" in fpn_kernels.available_backends(), reason="Triton serves this machine")
def test_a_backend_that_is_not_here_is_not_measured() -> None:
    for unit in (_unit(f"{LIBRARY}/triton"), rows.smoke(True, ["triton"])[-1], rows.sample(["triton"])[0]):
        result = worker.execute(unit, CPU)
        assert result["status"] == "not measured", result
        assert "backend 'triton' is not available here" in result["reason"]


def test_memory_that_is_not_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")

    monkeypatch.setattr(measure, "workload", exhausted)
    reason = worker.execute(_unit(), CPU)["reason"]
    assert reason == "out of memory: CUDA out of memory. Tried to allocate 80 GiB."


def test_one_failed_compilation_does_not_stop_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    providers.compilation_failed(RuntimeError("no choice of this shape works"))
    with pytest.raises(providers.NotMeasuredError, match="no choice of this shape"):
        providers.require_compiler("cpu")
    assert worker.execute(_unit(), CPU)["status"] == "ok"
    assert not providers._compile_failure


@pytest.mark.parametrize("operator", smoke._OPERATORS)
def test_every_operator_has_its_smoke(operator: str) -> None:
    unit = {**rows.smoke(True, [])[-1], "operator": operator}
    result = worker.execute(unit, CPU)
    assert result["status"] == "ok", result
    assert 0 < result["error"] < 1e-5 and operator in rows.SMOKE_OPERATORS
