"""Runs units in a process of its own, which may hang or crash: `python -m benchmarks.gpu.worker UNITS RESULTS`.

UNITS is a JSON list; RESULTS gets a line of JSON when a unit begins and one when it ends, so that whoever reads it
knows in which unit this process stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import allocator, bench_ceilings, providers
from benchmarks.clock import Clock
from benchmarks.gpu import candidates, environment, measure, smoke
from benchmarks.gpu.rows import Unit, case_of
from benchmarks.gpu.units import CONTEXT_LOST

# Seconds that a ceiling is measured for: long enough for the clock rates to be those of a busy GPU.
_CEILING_SECONDS = 0.6
_CEILING_ROUNDS = 40


class _Ceiling:
    """A `benchmarks.harness.Gauge` that keeps the fastest round."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.result: dict[str, Any] = {}

    def ceiling(self, name: str, source: str, amount: int, call: Callable[[], Any]) -> None:
        clock = Clock(self.device)
        for _ in range(3):
            once = clock.caller_seconds(call)
        rounds = 3 if self.tiny else max(5, min(_CEILING_ROUNDS, int(_CEILING_SECONDS / once)))
        if clock.on_gpu:
            seconds = [clock.device_seconds(call, queue_ahead=1e-4) for _ in range(rounds)]
        else:
            seconds = [clock.caller_seconds(call) for _ in range(rounds)]
        self.result = {"limit": name, "source": source, "amount": amount, "rate": amount / min(seconds)}


def _ceiling(unit: Unit, device: torch.device) -> dict[str, Any]:
    gauge = _Ceiling(device, unit["tiny"])
    if unit["measures"] == "copy":
        bench_ceilings.bench_copy("once", gauge)
    elif unit["measures"] == "matrix product":
        bench_ceilings.bench_matmul("once", unit["dtype"], gauge)
    else:
        bench_ceilings.bench_conv3x3("once", unit["dtype"], gauge)
    return {**gauge.result, "gpu": environment.nvidia_smi()}  # the clocks and the power of a moment ago


def _row(unit: Unit, device: torch.device) -> dict[str, Any]:
    providers.forget_failed_compilation()
    return measure.measure(case_of(unit), measure.provider_named(unit["provider"]), device)


def _smoke(unit: Unit, device: torch.device) -> dict[str, Any]:
    return smoke.check(unit["operator"], unit["dtype"], unit["layout"], unit["backend"], unit["tiny"], device)


def _sample(unit: Unit, device: torch.device) -> dict[str, Any]:
    return smoke.sample(unit["operator"], unit["dtype"], unit["layout"], unit["backend"], device)


_KINDS = {
    "ceiling": _ceiling,
    "row": _row,
    "smoke": _smoke,
    "sample": _sample,
    "candidates": candidates.measure,
}


def execute(unit: Unit, device: torch.device) -> dict[str, Any]:
    """The unit's result with `status` "ok", or "failed" or "not measured" with the reason; never raises."""
    try:
        return {"status": "ok", **_KINDS[unit["kind"]](unit, device)}
    except providers.NotMeasuredError as error:
        return {"status": "not measured", "reason": _first_lines(error)}
    except torch.OutOfMemoryError as error:
        return {"status": "failed", "reason": f"out of memory: {_first_lines(error)}"}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {_first_lines(error)}"}


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400]


def _context_lost(device: torch.device) -> bool:
    """After an illegal access every later call of the process fails: it is of no more use."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def work(units: list[Unit], results: TextIO, device: torch.device) -> int:
    """Runs the units in turn; returns the exit status."""

    def say(line: dict[str, Any]) -> None:
        results.write(json.dumps(line) + "\n")
        results.flush()

    for unit in units:
        say({"begin": unit["id"]})
        result = execute(unit, device)
        say({"end": unit["id"], **result})
        gc.collect()
        if _context_lost(device):
            return CONTEXT_LOST
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("units", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    allocator.keep_pages()
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    with options.results.open("a") as results:
        return work(json.loads(options.units.read_text()), results, device)


if __name__ == "__main__":
    sys.exit(main())
