"""One row: a provider on a case, eager's rounds between its own, on every clock that the device has."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import CHAINED, COMPILE, LIBRARY, MAX_AUTOTUNE, TRAINING, Case
from benchmarks.clock import Clock
from benchmarks.gpu.workloads import workload
from benchmarks.harness import Prepared, prepared
from benchmarks.providers import Provider
from benchmarks.replay import GraphTimer, input_sets
from benchmarks.workloads import Workload

# Seconds that the rounds of one clock may take together, and how many there are at least and at most.
_SECONDS = 0.25
_FEWEST, _MOST = 5, 25

Call = Callable[[], Any]


def provider_named(name: str) -> Provider:
    """A provider from its name in the report.

    max-autotune is taken without CUDA graphs of its own: those copy every input into the graph's memory first, which
    costs more than a merge does, while a replay of the harness's own graph runs the kernels alone. It is the stronger
    form of the rival.
    """
    if name == COMPILE:
        return Provider(name, compile_mode="default")
    if name == MAX_AUTOTUNE:
        return Provider(name, compile_mode="max-autotune-no-cudagraphs")
    if name == CHAINED:
        return Provider(name, fused=True, unforced=("top_down_pathway",))
    library, _, backend = name.partition("/")
    if library != LIBRARY:
        raise ValueError(f"name: expected {COMPILE!r}, {MAX_AUTOTUNE!r} or {LIBRARY!r}[/backend], got {name!r}")
    return Provider(name, fused=True, backend=backend or None)


def measure(case: Case, provider: Provider, device: torch.device) -> dict[str, Any]:
    """Checks the provider against eager, then times both.

    Returns:
        `bytes` and `flops` of the case; `served_by`; `prepare_seconds`, compilation included; a summary of rounds (see
        `_summary`) for each clock: `host` (until the call returns), `caller` (until the result is there) and, on a
        GPU, `device`, with `method` "graph" or "events" and the reason for the latter; and in training on a GPU
        `peak_bytes` of both, what a step takes beyond its inputs.

    Raises:
        NotMeasuredError: the provider cannot be measured here.
        WrongResultError: its results are not eager's.
    """
    began = time.perf_counter()
    work = workload(case, device)
    with prepared(case, provider, work) as ready:
        row: dict[str, Any] = {
            "bytes": work.cost.bytes,
            "flops": work.cost.flops,
            "served_by": ready.served_by,
            "prepare_seconds": round(time.perf_counter() - began, 3),
        }
        clock = Clock(device)
        calls = {"eager": ready.eager, "own": ready.run}
        once: dict[str, Call] = {name: functools.partial(call, *work.inputs) for name, call in calls.items()}
        row |= _time_caller(clock, once)
        if clock.on_gpu:
            if case.direction == TRAINING:
                row["peak_bytes"] = {name: _peak_bytes(call) for name, call in once.items()}
            row |= _time_device(clock, work, ready, once, 2 * max(row["host"]["own"], row["host"]["eager"]))
    return row


def _summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians in seconds of "own" and "eager", and of their ratio, pair by pair: above 1, eager took longer.

    `spread` is the middle half of the ratios over their median.
    """
    ratios = [pair["eager"] / pair["own"] for pair in rounds]
    first, ratio, third = statistics.quantiles(ratios, n=4, method="inclusive")
    own, eager = (statistics.median(pair[name] for pair in rounds) for name in ("own", "eager"))
    return {
        "own": round(own, 9),
        "eager": round(eager, 9),
        "ratio": round(ratio, 4),
        "spread": round((third - first) / ratio, 4),
        "rounds": len(rounds),
    }


def _rounds(seconds_of_one: float) -> int:
    return max(_FEWEST, min(_MOST, int(_SECONDS / max(seconds_of_one, 1e-9))))


def _time_caller(clock: Clock, once: dict[str, Call]) -> dict[str, Any]:
    """What the caller sees, a GPU's cache cold."""
    count = _rounds(sum(_settled(clock, call) for call in once.values()))
    host: list[dict[str, float]] = []
    caller: list[dict[str, float]] = []
    for _ in range(count):
        host.append({})
        caller.append({})
        for name, call in once.items():
            clock.prepare()
            host[-1][name], caller[-1][name] = clock.host_and_caller_seconds(call)
    return {"host": _summary(host), "caller": _summary(caller)}


def _settled(clock: Clock, call: Call) -> float:
    """The second of two calls: the first may still tune or allocate."""
    clock.synchronize()
    clock.caller_seconds(call)
    return clock.caller_seconds(call)


def _peak_bytes(call: Call) -> int:
    """Device memory that a step holds at its worst moment beyond what was held before: results and all between."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _time_device(
    clock: Clock, work: Workload, ready: Prepared, once: dict[str, Call], queue_ahead: float
) -> dict[str, Any]:
    """By graph replay; where either cannot be captured, both by events around single calls."""
    by_events = {name: functools.partial(clock.device_seconds, call, queue_ahead) for name, call in once.items()}
    estimates = {name: min(timer() for _ in range(3)) for name, timer in by_events.items()}
    result: dict[str, Any] = {"method": "graph"}
    timers: dict[str, Callable[[], float]]
    try:
        timers = _graph_timers(clock, work, ready, estimates)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises where more is wrong than the capture
        timers = dict(by_events)
        result = {"method": "events", "method_reason": f"{type(error).__name__}: {error}"[:300]}
    count = _rounds(sum(_duration(timer) for timer in timers.values()))
    rounds = [{name: timer() for name, timer in timers.items()} for _ in range(count)]
    return {**result, "device": _summary(rounds)}


def _graph_timers(
    clock: Clock, work: Workload, ready: Prepared, estimates: dict[str, float]
) -> dict[str, Callable[[], float]]:
    sets = input_sets(work.inputs, clock.cache_bytes)
    runs = {"eager": ready.eager, "own": ready.run}
    return {
        name: GraphTimer([functools.partial(run, *inputs) for inputs in sets], estimates[name]).seconds
        for name, run in runs.items()
    }


def _duration(timer: Callable[[], float]) -> float:
    begin = time.perf_counter()
    timer()
    return time.perf_counter() - begin
