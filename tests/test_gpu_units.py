"""What the GPU run starts: units in workers that hang or crash, the tests, a sanitizer; and what it makes of each."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import checks
from benchmarks.gpu.children import Child
from benchmarks.gpu.units import CONTEXT_LOST, Pool

# --- units in workers ------------------------------------------------------------------------------------------------

WORKER = f"""
import json, os, signal, sys, time
units, results = sys.argv[1:]
if os.path.exists("broken"):
    sys.exit("no such device")
with open(results, "a") as file:
    def say(**line):
        file.write(json.dumps(line) + "\\n")
        file.flush()
    for unit in json.load(open(units)):
        say(begin=unit["id"])
        if unit["act"] == "hang":
            time.sleep(600)
        if unit["act"] == "crash":
            print("about to crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if unit["act"] == "half a line":
            file.write('{{"end": "' + unit["id"])
            file.flush()
            os._exit(0)
        say(end=unit["id"], status="ok", pid=os.getpid())
        if unit["act"] == "lose the context":
            sys.exit({CONTEXT_LOST})
"""


def _units(
    tmp_path: Path, *acts: str, seconds: float = 30, **pool: Any
) -> tuple[dict[str, dict[str, Any]], str | None]:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    results: dict[str, dict[str, Any]] = {}
    pool = Pool(
        [sys.executable, str(worker)], tmp_path, tmp_path, finished=lambda u, r: results.update({u["id"]: r}), **pool
    )
    units = [{"id": f"{index} {act}", "act": act, "budget": 1.0} for index, act in enumerate(acts)]
    left = pool.run(units, time.monotonic() + seconds)
    assert list(results) == [unit["id"] for unit in units]  # each has its end, in order
    return results, left


def test_a_hanging_unit_costs_its_budget_and_no_other(tmp_path: Path) -> None:
    results, left = _units(tmp_path, "work", "hang", "work")
    assert [result["status"] for result in results.values()] == ["ok", "not measured", "ok"]
    assert results["1 hang"]["reason"] == "budget: not done within 1 s" and left is None


def test_a_crash_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    results, _ = _units(tmp_path, "work", "crash", "half a line", "work")
    assert [result["status"] for result in results.values()] == ["ok", "failed", "failed", "ok"]
    assert results["1 crash"]["reason"] == "the worker ended: killed by SIGSEGV"
    assert "about to crash" in results["1 crash"]["output"]
    assert results["2 half a line"]["reason"] == "the worker ended: exit status 0"


def test_after_a_lost_context_comes_a_new_process(tmp_path: Path) -> None:
    results, _ = _units(tmp_path, "work", "lose the context", "work", "work")
    pids = [result["pid"] for result in results.values()]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_units_beyond_the_time_are_named(tmp_path: Path) -> None:
    began = time.monotonic()
    results, left = _units(tmp_path, "work", "hang", "work", seconds=0.8)
    assert time.monotonic() - began < 4 and left == "no time left"
    assert [result["status"] for result in results.values()][1:] == ["not measured"] * 2
    assert results["2 work"]["reason"] == "no time left"


def test_a_worker_that_does_not_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    results, left = _units(tmp_path, "work", "work")
    assert {result["status"] for result in results.values()} == {"failed"}
    assert left is not None and "exit status 1; no such device" in left


# --- tests and sanitizer ---------------------------------------------------------------------------------------------

SUITE = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

def test_right(): pass

@pytest.mark.parametrize("target", ["eager-cuda", "triton-cuda"])
def test_of_a_target(target): pass

def test_wrong(): assert 1 == 2, "one is not two"

def test_crash(): os.environ.get("LATE") or os.abort()

def test_absent(): pytest.skip("not here")

def test_late(): time.sleep(float(os.environ.get("LATE", 0)))
"""


def _tests(tmp_path: Path, seconds: float = 60, processes: int = 1) -> tuple[dict[str, Any], str]:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    counts: dict[str, Any] = {}
    with pytest.raises(checks.StepFailed) as failed:
        checks.run_tests(counts, tmp_path, [str(suite)], time.monotonic() + seconds, dry_run=False, processes=processes)
    return counts, str(failed.value)


def test_tests_go_on_after_a_crash(tmp_path: Path) -> None:
    counts, reason = _tests(tmp_path)
    names = ("collected", "passed", "failed", "skipped", "crashed", "not_run")
    assert [counts[name] for name in names] == [7, 4, 1, 1, 1, 0]
    assert reason == "4 passed, 1 failed, 1 skipped, 1 crashed, 0 of 7 not run"
    messages = {failure["test"].rpartition("::")[2]: failure["message"] for failure in counts["failures"]}
    assert "one is not two" in messages["test_wrong"] and "ended in this test" in messages["test_crash"]
    begun = [json.loads(line).get("begin", "") for line in (tmp_path / "outcomes-0.jsonl").read_text().splitlines()]
    assert [name for name in begun if name][-1].endswith("[eager-cuda]")  # the library's kernels come first


def test_tests_in_several_processes_are_counted_together(tmp_path: Path) -> None:
    counts, reason = _tests(tmp_path, processes=3)
    assert reason == "4 passed, 1 failed, 1 skipped, 1 crashed, 0 of 7 not run"
    assert len(counts["failures"]) == 2 and len(counts["slowest"]) == 6
    parts = [(tmp_path / f"outcomes-{index}.jsonl").read_text() for index in range(3)]
    begun = [re.findall(r'"begin": "([^"]*)"', part) for part in parts]
    assert all(begun) and len({name for names in begun for name in names}) == 7


def test_tests_that_hang_leave_what_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATE", "600")
    outcomes = tmp_path / "outcomes-0.jsonl"

    def now() -> float:
        """The time is up as soon as the late test has begun, however long the others took to get there."""
        begun = outcomes.exists() and re.search(r'"begin": "[^"]*test_late"', outcomes.read_text())
        return math.inf if begun else 0.0

    monkeypatch.setattr(checks, "time", types.SimpleNamespace(monotonic=now, sleep=time.sleep))
    counts, _ = _tests(tmp_path)
    names = ("passed", "failed", "skipped", "crashed", "not_run")
    assert [counts[name] for name in names] == [3, 1, 1, 0, 2]  # not the late one, nor eager's after it


@pytest.mark.parametrize(
    ("tool", "says", "status", "reason"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors", "ok", "0 errors in 1 of 1 launches"),
        ("memcheck", "========= ERROR SUMMARY: 2 errors", "failed", "2 errors in 1 of 1 launches"),
        ("memcheck", "========= ERROR SUMMARY: 1 error", "failed", "1 errors in 1 of 1 launches"),
        ("racecheck", "===== RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)", "ok", "0 errors in"),
        ("racecheck", "===== RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)", "failed", "1 errors in"),
        ("racecheck", "===== RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "failed", "1 errors in"),
        ("racecheck", "========= Error: Device not supported", "failed", "it gave no summary: exit status 0"),
    ],
)
def test_what_a_sanitizer_says_is_understood(tmp_path: Path, tool: str, says: str, status: str, reason: str) -> None:
    child = Child(["echo", says], tmp_path / "log", tmp_path)
    assert child.wait(10)
    ran = [{"begin": "a"}, {"end": "a", "status": "ok"}, {"end": "b", "status": "not measured", "reason": "no"}]
    entry = checks._judged(tool, child, True, ran, 2)
    assert entry["status"] == status and entry["reason"].startswith(reason)
    assert checks._judged(tool, child, False, ran, 2)["status"] == "not measured"
    wrong = [{"end": "a", "status": "failed", "reason": "an illegal access"}]
    assert checks._judged(tool, child, True, wrong, 1)["reason"] == "a: an illegal access"
