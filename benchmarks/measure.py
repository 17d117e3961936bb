"""The measurement of a row: check the results against eager, then time both, eager's rounds between the provider's."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import EAGER, TRAINING, Case
from benchmarks.clock import Clock, GraphTimer, input_sets
from benchmarks.internals import BackendUnavailableError, record_calls, tf32_is_allowed
from benchmarks.providers import NotMeasuredError, Provider, compiler_missing
from benchmarks.workloads import Contender, Workload, dtype_of, tensors, training_step, workload

# The largest error against eager, as a fraction of eager's largest value. Both round at most twice (a convolution, then
# a sum): 2 * 2^-8 in bf16, 2 * 2^-11 in fp16; in fp32 the order of the sums decides, and TF32 on CUDA (2 * 2^-11).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_TF32 = 2.0**-10
_WARM_UP_SECONDS = 0.1
_MIN_ROUNDS, _MAX_ROUNDS = 3, 100

Call = Callable[[], Any]
Record = dict[str, Any]
# Runs a round so many times, each after its setup.
Repeat = Callable[[Call, Call, int], None]


class WrongResultError(AssertionError):
    """The results are not those of eager; such a provider is not timed."""


@dataclass(frozen=True)
class Ready:
    """A provider whose results were checked.

    Attributes:
        run, baseline: the whole call, with the backward in a training case; both take the workload's inputs.
        served_by: operator to the backends that served it; empty without the library.
    """

    run: Callable[..., Any]
    baseline: Callable[..., Any]
    served_by: Mapping[str, str]


def plain_repeat(once: Call, before: Call, rounds: int) -> None:
    for _ in range(rounds):
        before()
        once()


def row(case: Case, provider: Provider, device: torch.device, seconds: float, repeat: Repeat = plain_repeat) -> Record:
    """Checks a provider against eager, then times both; of a candidate, "eager" is the library.

    Args:
        case, provider: the row.
        device: where the tensors are.
        seconds: for the rounds of each clock together, except that there are at least three.
        repeat: runs the rounds of the caller's clock (pytest-benchmark, where it is installed).

    Returns:
        Bytes, operations, backends, and a summary of rounds per clock: "host", "caller" and, on a GPU, "device"; in
        training on a GPU the peak memory of both.

    Raises:
        NotMeasuredError: the provider cannot be measured here.
        WrongResultError: its results are not those of eager.
    """
    began = time.perf_counter()
    work, clock = workload(case, device), Clock(device)
    with checked(case, provider, work) as ready:
        prepared = round(time.perf_counter() - began, 3)
        cost = {"bytes": work.cost.bytes, "flops": work.cost.flops}
        record: Record = {**cost, "served_by": dict(ready.served_by), "prepare_seconds": prepared}
        alone = provider.name == EAGER and not provider.candidate
        calls = {"own": ready.run} if alone else {"eager": ready.baseline, "own": ready.run}
        once: dict[str, Call] = {name: functools.partial(call, *work.inputs) for name, call in calls.items()}
        host, caller = _time_caller(clock, once, seconds, repeat)
        record |= {"host": summary(host), "caller": summary(caller)}
        if clock.on_gpu:
            if case.direction == TRAINING:
                record["peak_bytes"] = {name: _peak_bytes(call) for name, call in once.items()}
            queue_ahead = 2 * max(statistics.median(each.values()) for each in host)
            record |= _time_device(clock, work, calls, once, queue_ahead, seconds)
        return record


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the times in seconds, and of eager's time over the row's own, pair by pair.

    `spread` is the middle half of these ratios over their median; in eager's own row that of the times.
    """
    found = {name: round(statistics.median(pair[name] for pair in rounds), 9) for name in rounds[0]}
    judged = [pair["eager"] / pair["own"] if "eager" in pair else pair["own"] for pair in rounds]
    first, middle, third = statistics.quantiles(judged, n=4, method="inclusive")
    if "eager" in rounds[0]:
        found["ratio"] = round(middle, 4)
    return {**found, "spread": round((third - first) / middle, 4), "rounds": len(rounds)}


def _rounds(seconds: float, of_one: float) -> int:
    return max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(seconds / max(of_one, 1e-9))))


def _time_caller(
    clock: Clock, once: Mapping[str, Call], seconds: float, repeat: Repeat
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Host and caller times of each round, a GPU's cache cold."""
    *others, own = once
    fastest = sum(_warm_up(clock, call, seconds) for call in once.values())
    host: list[dict[str, float]] = []
    caller: list[dict[str, float]] = []

    def take(name: str) -> None:
        host[-1][name], caller[-1][name] = clock.host_and_caller_seconds(once[name])

    def before() -> None:
        host.append({})
        caller.append({})
        for name in others:
            clock.prepare()
            take(name)
        clock.prepare()

    repeat(lambda: take(own), before, _rounds(seconds, fastest))
    return host, caller


def _warm_up(clock: Clock, call: Call, seconds: float) -> float:
    """Calls until caches, allocator and clock rate have settled; the fastest call's seconds."""
    times: list[float] = []
    while not times or (sum(times) < min(_WARM_UP_SECONDS, seconds) and len(times) < _MAX_ROUNDS):
        clock.synchronize()
        times.append(clock.caller_seconds(call))
    return min(times)


def _peak_bytes(call: Call) -> int:
    """Device memory of a step at its peak, beyond the memory held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _time_device(
    clock: Clock,
    work: Workload,
    calls: Mapping[str, Callable[..., Any]],
    once: Mapping[str, Call],
    queue_ahead: float,
    seconds: float,
) -> Record:
    """By graph replay; if one of the calls cannot be captured, all by events around single calls."""
    timers: dict[str, Callable[[], float]] = {
        name: functools.partial(clock.device_seconds, call, queue_ahead) for name, call in once.items()
    }
    estimates = {name: min(timer() for _ in range(3)) for name, timer in timers.items()}
    record: Record = {"method": "graph"}
    sets = input_sets(work.inputs, clock.cache_bytes)
    try:
        timers = {
            name: GraphTimer([functools.partial(run, *inputs) for inputs in sets], estimates[name]).seconds
            for name, run in calls.items()
        }
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises if more than the capture failed
        record = {"method": "events", "method_reason": f"{type(error).__name__}: {error}"[:300]}
    began = time.perf_counter()
    first = {name: timer() for name, timer in timers.items()}
    count = _rounds(seconds, time.perf_counter() - began)
    rounds = [first, *({name: timer() for name, timer in timers.items()} for _ in range(count - 1))]
    return {**record, "device": summary(rounds)}


@contextlib.contextmanager
def checked(case: Case, provider: Provider, work: Workload) -> Iterator[Ready]:
    """Checks a provider's results against eager; inside the block both can be timed.

    Raises:
        NotMeasuredError: the forced backend does not serve the case, or torch.compile does not work.
        WrongResultError: the results are not those of eager.
    """
    reason = compiler_missing(work.inputs[0].device.type) if provider.compile_mode else None
    if reason:
        raise NotMeasuredError(reason)
    training = case.direction == TRAINING
    computed = dtype_of(case)
    with torch.set_grad_enabled(training), provider.selected():
        contender = work.fused if provider.fused else work.eager
        contender = Contender(provider.candidate) if provider.candidate else contender
        baseline = work.fused if provider.candidate else work.eager
        run, other = provider.wrap(contender.call), baseline.call
        with record_calls() as calls:
            expected, actual = tensors(work.eager.call(*work.inputs)), _first_call(provider, run, work)
            check(actual, expected, exact=work.exact and provider.fused, roundings=work.roundings, computed=computed)
            if training:
                grads = cotangents(expected)
                run, other = training_step(contender, run, grads), training_step(baseline, other, grads)
                expected = training_step(work.eager, work.eager.call, grads)(*work.inputs)
                actual = _first_call(provider, run, work)
                check(actual, expected, sizes=work.differences, roundings=work.roundings, computed=computed)
        del expected, actual
        yield Ready(run, other, _served_by(calls))


def _first_call(provider: Provider, run: Callable[..., Any], work: Workload) -> list[Tensor]:
    """Compiles, and finds out whether a forced backend serves the case."""
    try:
        return tensors(run(*work.inputs))
    except BackendUnavailableError as error:
        if provider.backend is None:
            raise
        raise NotMeasuredError(str(error)) from error
    except Exception as error:
        if provider.compile_mode and type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise NotMeasuredError(f"torch.compile failed here: {said}"[:300]) from error
        raise


def check(
    actual: list[Tensor],
    expected: list[Tensor],
    *,
    exact: bool = False,
    sizes: Mapping[int, float] | None = None,
    roundings: int = 1,
    computed: torch.dtype | None = None,
) -> None:
    """Raises `WrongResultError` unless every tensor equals eager's, bit for bit or within the tolerance.

    Args:
        actual, expected: the results, and eager's.
        exact: bit for bit.
        sizes: index of a result to the size that replaces eager's largest value if it is larger.
        roundings: multiplies the tolerance. Four merges in bfloat16 (C5 to C2 of 800 x 1280) were seen to differ by 1 %
            of the largest value.
        computed: the dtype of the computation, where that of a result is wider (autocast).
    """
    if len(actual) != len(expected):
        raise WrongResultError(f"{len(actual)} results where eager gives {len(expected)}")
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise WrongResultError(
                f"result {index} is {got.dtype} {tuple(got.shape)}, eager's {want.dtype} {tuple(want.shape)}"
            )
        got, want = got.detach(), want.detach()
        if exact:
            if not torch.equal(got, want):
                raise WrongResultError(f"result {index} differs from eager in {int((got != want).sum())} elements")
            continue
        allowed = roundings * max(TOLERANCE[want.dtype], TOLERANCE[computed or want.dtype])
        if want.is_cuda and tf32_is_allowed():
            allowed = max(allowed, roundings * _TF32)
        largest = max(float(want.abs().max()), (sizes or {}).get(index, 0.0))
        error = float((got.double() - want.double()).abs().max())
        if not error <= allowed * largest:  # not "error > ...", which a NaN would pass
            raise WrongResultError(
                f"result {index} is off by {error:.3g} where eager's largest value is {largest:.3g};"
                f" allowed is {allowed:.2g} of it"
            )


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """A random gradient for each output, in its layout."""
    generator = torch.Generator(outputs[0].device).manual_seed(1612)
    return [torch.empty_like(output, requires_grad=False).normal_(generator=generator) for output in outputs]


def _served_by(calls: list[tuple[str, str]]) -> dict[str, str]:
    """Operator to the backends that served it, in order."""
    served: dict[str, dict[str, None]] = {}
    for operator, backend in calls:
        served.setdefault(operator, {})[backend] = None
    return {operator: "+".join(names) for operator, names in served.items()}


def launch(case: Case, provider: Provider, device: torch.device, *, blank: bool = False) -> Record:
    """Runs the library once, for compute-sanitizer and, with `blank`, for compilation behind `no_launch`.

    Checks that the results are finite. Of a training case, the gradients of maps and biases: the gradient of a weight
    is PyTorch's own product.
    """
    work = workload(case, device, blank=blank)
    for tensor in work.inputs:
        if tensor.shape[2:] in ((1, 1), (3, 3)):
            tensor.requires_grad_(False)
    try:
        with torch.set_grad_enabled(case.direction == TRAINING), provider.selected():
            results = tensors(work.fused.call(*work.inputs))
            if case.direction == TRAINING:
                grads = [torch.empty_like(each) if blank else torch.ones_like(each) for each in results]
                inputs = [tensor for tensor in work.inputs if tensor.requires_grad]
                results += torch.autograd.grad(results, inputs, grads)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    if not blank and not all(bool(torch.isfinite(each.detach().cpu()).all()) for each in results):
        raise WrongResultError("a result is not finite")
    return {}
