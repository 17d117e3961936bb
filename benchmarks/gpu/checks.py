"""The steps that find mistakes: the tests marked `gpu`, and compute-sanitizer over a few launches of each kernel."""

from __future__ import annotations

import json
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
    counts: dict[str, Any], folder: Path, chosen: Sequence[str], deadline: float, *, dry_run: bool
) -> str | None:
    """Runs the tests marked `gpu` in one process, and again from where it stopped if that process is lost.

    Fills `counts`: collected, passed, failed, skipped, crashed, not_run, failures (test and message), slowest.
    """
    outcomes = folder / "outcomes.jsonl"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    # Where pytest-randomly is installed: what did not run before the time was over should not be a matter of chance.
    command += ["-p", "no:randomly", "-p", "benchmarks.gpu.outcomes", *chosen]
    environment = {"OUTCOMES_FILE": str(outcomes), "PYTEST_TIMEOUT": _TEST_TIMEOUT, "PYTEST_ADDOPTS": ""}
    late = False
    for _ in range(_MOST_PROCESSES):
        before = _lines(outcomes)
        child = Child(command, folder / "tests.log", ROOT, environment)
        late = not child.wait(deadline - time.monotonic())
        counts.clear()
        counts.update(_counted(_lines(outcomes), stopped=late))
        # 5: nothing collected that was not there already.
        if late or counts["not_run"] == 0 or len(_lines(outcomes)) == len(before):
            break
    if not counts["collected"]:
        raise StepFailed(f"no test was collected: {child.how_it_ended()}; {child.last_line()}")
    said = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    said += f", {counts['crashed']} crashed, {counts['not_run']} of {counts['collected']} not run"
    if counts["failed"] or counts["crashed"] or not (counts["passed"] or dry_run):
        raise StepFailed(said)
    return said + (" (no time left)" if late else "")


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
    slowest = sorted(ended.values(), key=lambda line: -line["seconds"])[:10]
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
