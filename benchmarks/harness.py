"""How one row is measured: check against eager, warm up, then time what the caller sees and what the device does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.cases import EAGER, TRAINING, Case
from benchmarks.clock import Clock
from benchmarks.workloads import Workload, tensors, training_step
from fpn_kernels import compatibility
from fpn_kernels.operators.dispatch import BackendUnavailableError, record_calls

# Largest error allowed against eager, as a fraction of eager's largest value. Both round at most twice on the way
# (a aten, then a sum), so they stay within a few units in the last place of the largest value. For bf16
# that is 2 * 2^-8, for fp16 2 * 2^-11; in fp32 the order of the sums decides (and TF32 on CUDA, 2 * 2^-11).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_TF32 = 2.0**-10
_WARM_UP_SECONDS = 0.1
_MOST_ROUNDS = 200


class WrongResultError(AssertionError):
    """A provider's output is not eager's: its time means nothing."""


@dataclass(frozen=True)
class Prepared:
    """A provider on a case, ready to be timed.

    Attributes:
        run, eager: the whole call, in a training case the backward included; both take the workload's inputs.
        served_by: operator to the backends that served it; empty for eager and torch.compile.
    """

    run: Callable[..., Any]
    eager: Callable[..., Any]
    served_by: dict[str, str]


class Gauge(Protocol):
    """What a ceiling's measurement asks of whoever runs it."""

    device: torch.device
    tiny: bool

    def ceiling(self, name: str, source: str, amount: int, call: Callable[[], Any]) -> None: ...


@dataclass
class Harness:
    """Bound to one test item.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        device: where the tensors live.
        seconds: what the rounds of a row may take together, unless `min_rounds` take longer.
        tiny: whether the sizes are those of the suite's own tests.
        announce: told the median of a row once it is known.
    """

    benchmark: Any
    device: torch.device
    seconds: float
    min_rounds: int
    tiny: bool
    announce: Callable[[float], None] = lambda median: None

    def measure(self, case: Case, provider: providers.Provider, make: Callable[[Case, torch.device], Workload]) -> None:
        """Builds the workload, checks the provider against eager, and times it, eager's rounds between its own."""
        work = make(case, self.device)
        self._describe(case, provider, work)
        try:
            with prepared(case, provider, work) as ready:
                self.benchmark.extra_info["served_by"] = ready.served_by
                baseline = None if provider.name == EAGER else lambda: ready.eager(*work.inputs)
                self._time(lambda: ready.run(*work.inputs), baseline)
        except providers.NotMeasuredError as reason:
            pytest.skip(str(reason))

    def ceiling(self, name: str, source: str, amount: int, call: Callable[[], Any]) -> None:
        """Times a call that stands for a limit of the machine, `amount` bytes or operations of it."""
        self.benchmark.group = "ceilings"
        self.benchmark.extra_info.update(ceiling=name, source=source, amount=amount)
        self._time(call)

    def _describe(self, case: Case, provider: providers.Provider, work: Workload) -> None:
        self.benchmark.group = f"{case.operator} {case.direction} | {case}"
        self.benchmark.extra_info.update(
            operator=case.operator,
            direction=case.direction,
            case=str(case),
            provider=provider.name,
            dtype=case.dtype,
            layout=case.layout,
            batch=case.batch,
            bytes=work.cost.bytes,
            flops=work.cost.flops,
        )

    def _time(self, call: Callable[[], Any], baseline: Callable[[], Any] | None = None) -> None:
        """Warm-up, then rounds until `seconds` are spent: one call a round, the device's work included.

        Each round of a provider follows one of eager's, timed here, and the report's ratio is the median over these
        pairs. On a machine that others use as well, its speed drifts by more, between one row and the next, than the
        providers differ; within a pair it does not.
        """
        clock = Clock(self.device)
        fastest = self._warm_up(call, clock) + (self._warm_up(baseline, clock) if baseline else 0.0)
        rounds = max(self.min_rounds, min(_MOST_ROUNDS, int(self.seconds / fastest)))
        eager_times: list[float] = []

        def before() -> None:
            if baseline:
                clock.prepare()
                eager_times.append(clock.caller_seconds(baseline))
            clock.prepare()

        def once() -> None:
            call()
            clock.synchronize()

        self.benchmark.pedantic(once, setup=before, rounds=rounds, iterations=1)
        info = self.benchmark.extra_info
        info["eager_times"] = eager_times
        if clock.on_gpu:
            info["device_times"], info["eager_device_times"] = [], []
            for _ in range(rounds):
                if baseline:
                    info["eager_device_times"].append(clock.device_seconds(baseline, queue_ahead=2 * fastest))
                info["device_times"].append(clock.device_seconds(call, queue_ahead=2 * fastest))
        if self.benchmark.stats is not None:  # None under --benchmark-disable
            self.announce(self.benchmark.stats.stats.median)

    def _warm_up(self, call: Callable[[], Any], clock: Clock) -> float:
        """Calls until the caches, the allocator and the clock rate have settled; the fastest call's seconds.

        A slow call gets one, after the one that was checked.
        """
        times: list[float] = []
        while not times or (sum(times) < min(_WARM_UP_SECONDS, self.seconds) and len(times) < _MOST_ROUNDS):
            clock.synchronize()
            times.append(clock.caller_seconds(call))
        return min(times)


@contextlib.contextmanager
def prepared(case: Case, provider: providers.Provider, work: Workload) -> Iterator[Prepared]:
    """A provider and eager on a case, once the provider has been seen to give eager's results; timed inside the block.

    Raises:
        NotMeasuredError: the forced backend does not serve the case, or torch.compile does not work.
        WrongResultError: the results are not eager's.
    """
    if provider.compile_mode:
        providers.require_compiler(work.inputs[0].device.type)
    training = case.direction == TRAINING
    with torch.set_grad_enabled(training), provider.selected():
        contender = work.fused if provider.fused else work.eager
        run, eager = provider.wrap(contender.call), work.eager.call
        twin = work.wide if work.wide and provider.fused else work.eager
        with record_calls() as calls:
            expected = _checked(provider, run, twin.call, work, exact=work.exact and provider.fused)
            if training:
                grads = _cotangents(expected)
                run, eager = training_step(contender, run, grads), training_step(work.eager, eager, grads)
                step = training_step(twin, twin.call, grads)
                _checked(provider, run, step, work, exact=False, sizes=work.differences)
        del expected
        yield Prepared(run, eager, _served_by(calls))


def _checked(
    provider: providers.Provider,
    run: Callable[..., Any],
    eager: Callable[..., Any],
    work: Workload,
    exact: bool,
    sizes: Mapping[int, float] | None = None,
) -> list[Tensor]:
    """Eager's results, once the provider has been seen to give the same.

    The provider's first call is here: it compiles, and finds out whether a forced backend serves this case.
    """
    expected = tensors(eager(*work.inputs))
    try:
        actual = tensors(run(*work.inputs))
    except BackendUnavailableError as error:
        if provider.backend is None:
            raise
        raise providers.NotMeasuredError(str(error)) from error
    except Exception as error:
        if provider.compile_mode and type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise providers.compilation_failed(error) from error
        raise
    check(actual, expected, exact=exact, sizes=sizes, depth=work.depth)
    return expected


def check(
    actual: list[Tensor],
    expected: list[Tensor],
    *,
    exact: bool,
    sizes: Mapping[int, float] | None = None,
    depth: int = 1,
) -> None:
    """Raises `WrongResultError` unless every tensor is eager's, to the bit or within the tolerance of its dtype.

    The tolerance is a share of eager's largest value, or of the size that `sizes` has for a result, if that is larger.
    It holds for each of `depth` merges in a row: at worst, what they round differently adds up. Four in bfloat16 (C5 to
    C2 of 800 x 1280) were seen to differ by 1 % of the largest value, where one may by 0.8 %.
    """
    if len(actual) != len(expected):
        raise WrongResultError(f"{len(actual)} results where eager gives {len(expected)}")
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise WrongResultError(
                f"result {index} is {got.dtype} {tuple(got.shape)}, eager's {want.dtype} {tuple(want.shape)}"
            )
        if exact:
            if not torch.equal(got, want):
                raise WrongResultError(f"result {index} differs from eager in {int((got != want).sum())} elements")
            continue
        tolerance = TOLERANCE[want.dtype]
        if want.is_cuda and want.dtype == torch.float32 and compatibility.tf32_is_allowed():
            tolerance = _TF32
        got, want = got.detach(), want.detach()
        tolerance *= depth
        error, largest = float((got.double() - want.double()).abs().max()), float(want.abs().max())
        largest = max(largest, (sizes or {}).get(index, 0.0))
        if not error <= tolerance * largest:  # not "error > ...", which a NaN would pass
            raise WrongResultError(
                f"result {index} is off by {error:.3g} where eager's largest value is {largest:.3g};"
                f" allowed is {tolerance:.2g} of it"
            )


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """A random gradient for each output, in its layout."""
    generator = torch.Generator(outputs[0].device).manual_seed(1612)
    return [torch.empty_like(output, requires_grad=False).normal_(generator=generator) for output in outputs]


def _served_by(calls: list[tuple[str, str]]) -> dict[str, str]:
    """Operator to the backends that served it, in the order in which they did; empty for eager and torch.compile."""
    served: dict[str, list[str]] = {}
    for operator, backend in calls:
        names = served.setdefault(operator, [])
        if backend not in names:
            names.append(backend)
    return {operator: "+".join(names) for operator, names in served.items()}
