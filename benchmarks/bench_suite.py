"""The items of the suite; `conftest.py` has their values.

`pytest benchmarks -k 'neck and bf16'` works as `python -m benchmarks` does, without its file and its report.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, measure, no_launch, providers
from benchmarks.cases import Case
from benchmarks.clock import Clock
from benchmarks.internals import tf32_is_allowed
from benchmarks.options import DTYPES

_MIN_ROUNDS, _MAX_ROUNDS = 3, 40


def bench_ceiling(
    ceiling: tuple[str, str, str],
    device: torch.device,
    seconds: float,
    repeat: measure.Repeat,
    record: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    """The limits of the machine: a copy, a matrix product, and a 3x3 convolution (the faster product on some CPUs)."""
    kind, dtype, _ = ceiling
    tiny = request.config.getoption("--small") or request.config.getoption("--select") == "tiny"
    # Where no instruction multiplies float16 a product runs at 2 GFLOP/s: small sizes.
    small = tiny or (device.type == "cpu" and dtype == "fp16")
    if kind == "copy":
        nbytes = 1 << 20 if tiny else {"cuda": 512 << 20, "cpu": 128 << 20}[device.type]
        source = torch.empty(nbytes // 4, dtype=torch.float32, device=device).uniform_()
        target = torch.zeros_like(source)
        limit, amount, call = "bandwidth", 2 * nbytes, lambda: target.copy_(source)
    elif kind == "matrix product":
        size = 64 if tiny else 256 if small else 8192 if device.type == "cuda" else 1536
        a, b = (_random(dtype, device, size, size) for _ in range(2))
        limit, amount, call = f"flops {dtype}", 2 * size**3, lambda: torch.mm(a, b, out=a.new_empty(size, size))
    else:
        batch, height, width = (1, 8, 8) if small else (8, 200, 320) if device.type == "cuda" else (1, 100, 160)
        feature, weight = _random(dtype, device, batch, 256, height, width), _random(dtype, device, 256, 256, 3, 3)
        limit, amount = f"flops {dtype}", 2 * 9 * 256 * 256 * batch * height * width
        call = lambda: F.conv2d(feature, weight, padding=1)  # noqa: E731
    # PyTorch has two switches for TF32; the operators follow that of the convolutions.
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32_is_allowed()
    try:
        with torch.no_grad():
            best = _best(call, Clock(device), seconds, repeat)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    record.update(limit=limit, source=kind, amount=amount, rate=amount / best)
    if device.type == "cuda":
        record["gpu"] = machine.nvidia_smi()  # the clocks and the power of a moment ago


def _random(dtype: str, device: torch.device, *shape: int) -> Tensor:
    """Random data: on a GPU the rate depends on it, through the power that the bits take."""
    made = torch.randn(shape, device=device).to(getattr(torch, DTYPES[dtype]))
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


def _best(call: measure.Call, clock: Clock, seconds: float, repeat: measure.Repeat) -> float:
    """The fastest round."""
    once = min(clock.caller_seconds(call) for _ in range(3))
    rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(seconds / once)))
    times: list[float] = []

    def take() -> None:
        times.append(clock.device_seconds(call, 1e-4) if clock.on_gpu else clock.caller_seconds(call))

    repeat(take, lambda: None, rounds)
    return min(times)


def bench_row(
    row: tuple[Case, str], device: torch.device, seconds: float, repeat: measure.Repeat, record: dict[str, Any]
) -> None:
    case, provider = row
    record.update(measure.row(case, providers.named(provider), device, seconds, repeat))


def bench_candidate(
    candidate: tuple[Case, providers.Candidate],
    device: torch.device,
    seconds: float,
    repeat: measure.Repeat,
    record: dict[str, Any],
) -> None:
    case, found = candidate
    provider = providers.Provider(found.name, candidate=found.call)
    record.update(measure.row(case, provider, device, seconds, repeat))


def bench_launch(launch: tuple[Case, str, bool], device: torch.device) -> None:
    case, provider, blank = launch
    if blank:
        with no_launch.triton_serves_the_cpu(keep=False):
            measure.launch(case, providers.named(provider), torch.device("cpu"), blank=True)
    else:
        measure.launch(case, providers.named(provider), device)
