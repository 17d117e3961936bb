"""The steps that find mistakes: the tests marked `gpu`, and compute-sanitizer over a few launches of each kernel."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.children import Child
from benchmarks.gpu.rows import Unit

ROOT = Path(__file__).resolve().parents[2]

# A test that hangs ends after this many seconds, where pytest-timeout is installed.
_TEST_TIMEOUT = "60"
_MOST_PROCESSES = 6
_MOST_FAILURES = 100
_MOST_SLOWEST = 10
_MOST_SHARDS = 12
_POLL = 0.05

_SANITIZERS: dict[str, list[str]] = {
    # What PyTorch asks of the driver and expects to be refused is no error of a kernel's.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
}
# memcheck counts errors; racecheck counts hazards, and in brackets how many of them are errors.
_SUMMARY = re.compile(
    r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed \((\d+) errors?)", re.MULTILINE
)


class StepFailed(Exception):  # noqa: N818 - an outcome, with its reason
    """The step did not do what it is for."""


class StepSkipped(Exception):  # noqa: N818 - an outcome, with its reason
    """There is nothing that the step could do here."""


def run_tests(
    counts: dict[str, Any],
    folder: Path,
    chosen: Sequence[str],
    deadline: float,
    *,
    dry_run: bool,
    processes: int = 1,
) -> str | None:
    """Runs the tests marked `gpu` in several processes, each of them again from where it stopped if it is lost.

    Fills `counts`: collected, passed, failed, skipped, crashed, not_run, failures (test and message), slowest.
    """
    shards = [_Shard(folder, chosen, index, processes) for index in range(processes)]
    running = shards
    try:
        while running and time.monotonic() < deadline:
            running = [shard for shard in running if not shard.is_done()]
            time.sleep(_POLL)
    finally:
        late = [shard.stop() for shard in shards]
    parts = [_counted(shard.lines(), stopped=stopped) for shard, stopped in zip(shards, late, strict=True)]
    counts.update(_added(parts))
    if not counts["collected"]:
        child = shards[0].child
        raise StepFailed(f"no test was collected: {child.how_it_ended()}; {child.last_line()}")
    said = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    said += f", {counts['crashed']} crashed, {counts['not_run']} of {counts['collected']} not run"
    if counts["failed"] or counts["crashed"] or not (counts["passed"] or dry_run):
        raise StepFailed(said)
    return said + (" (no time left)" if any(late) else "")


def processes_for_tests() -> int:
    """Three for four cores: most of a test is compilation, and each process has a CUDA context of its own."""
    return max(1, min(_MOST_SHARDS, (os.cpu_count() or 1) * 3 // 4))


class _Shard:
    """Every so many-th of the tests, in a process of its own."""

    def __init__(self, folder: Path, chosen: Sequence[str], index: int, count: int) -> None:
        self._outcomes = folder / f"outcomes-{index}.jsonl"
        self._outcomes.unlink(missing_ok=True)
        self._command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
        # Where pytest-randomly is installed: what did not run before the time was over should not be chance.
        self._command += ["-p", "no:randomly", "-p", "benchmarks.gpu.outcomes", *chosen]
        self._environment = {"OUTCOMES_FILE": str(self._outcomes), "OUTCOMES_SHARD": f"{index}/{count}"}
        self._environment |= {"PYTEST_TIMEOUT": _TEST_TIMEOUT, "PYTEST_ADDOPTS": ""}
        self._log = folder / f"tests-{index}.log"
        self._begun = 0
        self._begin()

    def _begin(self) -> None:
        self._before = len(self.lines())
        self.child = Child(self._command, self._log, ROOT, self._environment)
        self._begun += 1

    def lines(self) -> list[dict[str, Any]]:
        return _lines(self._outcomes)

    def is_done(self) -> bool:
        """Whether all of it had its turn, or another process would get no further; begins that other one."""
        if self.child.status() is None:
            return False
        lines = self.lines()
        left = _counted(lines, stopped=False)["not_run"]
        if left == 0 or len(lines) == self._before or self._begun == _MOST_PROCESSES:
            return True
        self._begin()
        return False

    def stop(self) -> bool:
        """Ends it; whether it still ran."""
        running = self.child.status() is None
        self.child.kill()
        return running


def _added(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several shards as those of one."""
    total = {name: sum(part[name] for part in parts) for name, value in parts[0].items() if isinstance(value, int)}
    failures = [failure for part in parts for failure in part["failures"]]
    slowest = sorted((test for part in parts for test in part["slowest"]), key=lambda test: -test["seconds"])
    return {**total, "failures": failures[:_MOST_FAILURES], "slowest": slowest[:_MOST_SLOWEST]}


def _lines(outcomes: Path) -> list[dict[str, Any]]:
    if not outcomes.exists():
        return []
    text = outcomes.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _counted(lines: Sequence[dict[str, Any]], *, stopped: bool) -> dict[str, Any]:
    """What the plugin's lines come to; a test that began and did not end crashed, unless the time ended it."""
    begun = [line["begin"] for line in lines if "begin" in line]
    ended = {line["end"]: line for line in lines if "end" in line}  # a failing teardown comes after its test
    unfinished = [name for name in begun if name not in ended]
    crashed = [name for name in unfinished if not (stopped and name == begun[-1])]
    outcomes = Counter(line["outcome"] for line in ended.values())
    failures = [{"test": n, "message": line.get("message", "")} for n, line in ended.items() if _failed(line)]
    failures += [{"test": name, "message": "the process ended in this test"} for name in crashed]
    slowest = sorted(ended.values(), key=lambda line: -line["seconds"])[:_MOST_SLOWEST]
    collected = next((line["collected"] for line in lines if "collected" in line), 0)
    return {
        "collected": collected,
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "crashed": len(crashed),
        "not_run": collected - len(ended) - len(crashed),
        "failures": failures[:_MOST_FAILURES],
        "slowest": [{"test": line["end"], "seconds": round(line["seconds"], 2)} for line in slowest],
    }


def _failed(line: dict[str, Any]) -> bool:
    return bool(line["outcome"] == "failed")


def run_sanitizer(
    entries: list[dict[str, Any]], folder: Path, sample: Sequence[Unit], device: str, deadline: float
) -> str | None:
    """memcheck, then racecheck, each over the sample in a worker of its own; each may take half of what is left."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise StepSkipped("compute-sanitizer is not installed")
    if not sample:
        raise StepSkipped("no backend with kernels is here")
    units = folder / "sample.json"
    units.write_text(json.dumps(list(sample)))
    for index, (tool, flags) in enumerate(_SANITIZERS.items()):
        results = folder / f"sample-{tool}.jsonl"
        results.unlink(missing_ok=True)
        worker = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", device, str(units), str(results)]
        # Exact bounds: PyTorch's allocator would hand out pieces of a block that memcheck sees as one.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, "--tool", tool, *flags, *worker]
        child = Child(command, folder / f"{tool}.log", ROOT, environment)
        share = (deadline - time.monotonic()) / (len(_SANITIZERS) - index)
        in_time = child.wait(share)
        entries.append(_judged(tool, child, in_time, _lines(results), len(sample)))
    if any(entry["status"] == "failed" for entry in entries):
        raise StepFailed("; ".join(f"{entry['tool']}: {entry['reason']}" for entry in entries))
    return "; ".join(f"{entry['tool']}: {entry['reason']}" for entry in entries)


def _judged(tool: str, child: Child, in_time: bool, said: Sequence[dict[str, Any]], total: int) -> dict[str, Any]:
    ended = [line for line in said if "end" in line]
    ran = sum(line["status"] == "ok" for line in ended)
    total -= sum(line["status"] == "not measured" for line in ended)  # a backend that does not serve this device
    wrong = [f"{line['end']}: {line['reason']}" for line in ended if line["status"] == "failed"]
    wrong += [f"{line['end']}: a result is not finite" for line in ended if line.get("finite") is False]
    entry: dict[str, Any] = {"tool": tool, "seconds": round(child.seconds(), 1), "ran": ran, "of": total}
    summary = _SUMMARY.search(child.output())
    if wrong:
        return {**entry, "status": "failed", "reason": "; ".join(wrong)[:600], "output": child.tail()}
    if not in_time:
        return {**entry, "status": "not measured", "reason": f"no time left: {ran} of {total} launches done"}
    if summary is None:
        reason = f"it gave no summary: {child.how_it_ended()}"
        return {**entry, "status": "failed", "reason": reason, "output": child.tail()}
    errors = int(summary.group(2) or summary.group(1))
    entry |= {"errors": errors, "reason": f"{errors} errors in {ran} of {total} launches"}
    if errors:
        return {**entry, "status": "failed", "output": child.output()[:4000]}
    if not ran:
        return {**entry, "status": "failed", "reason": "no unit of the sample ran", "output": child.tail()}
    return {**entry, "status": "ok"}
