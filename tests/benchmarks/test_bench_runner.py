"""Child processes with a budget: items that hang or crash, a process that does not start, a time that is over."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.runner import NO_TIME, Child, Items

SUITE = """
import os, signal, sys, time
import pytest

pytestmark = pytest.mark.gpu

def test_right(): pass

@pytest.mark.parametrize("target", ["eager-cuda", "triton-cuda"])
@pytest.mark.parametrize("dtype", ["a", "b"])
def test_of_a_target(target, dtype): pass

def test_wrong(): assert 1 == 2, "one is not two"

def test_crash():
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def test_torn_line():
    with open(os.environ["ITEMS_FILE"], "a") as file:
        file.write('{"end": "test_torn')
    os._exit(0)

def test_absent(): pytest.skip("not here")

def test_hang(): time.sleep(600)

@pytest.fixture
def broken():
    yield
    raise RuntimeError("while it was torn down")

def test_teardown(broken): pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return tmp_path


def _run(suite: Path, words: str, seconds: float = 120, **options: Any) -> tuple[dict[str, dict[str, Any]], str | None]:
    results: dict[str, dict[str, Any]] = {}

    def finished(name: str, unit: dict[str, Any], result: dict[str, Any]) -> None:
        assert name not in results
        results[name.partition("::")[2]] = result

    command = [str(suite / "test_suite.py"), "-k", words, "-q", "-p", "no:faulthandler"]
    items = Items(command, suite, "items", finished, item_budget=6.0, **options)
    left = items.run(time.monotonic() + seconds)
    assert len(results) == items.collected
    return results, left


def test_an_item_that_hangs_or_crashes_costs_no_other(suite: Path) -> None:
    results, left = _run(suite, "")
    assert left is None
    assert {name: result["status"] for name, result in results.items()} == {
        "test_right": "ok",
        **{f"test_of_a_target[{dtype}-{target}-cuda]": "ok" for dtype in "ab" for target in ("eager", "triton")},
        **dict.fromkeys(("test_wrong", "test_crash", "test_torn_line", "test_teardown"), "failed"),
        "test_absent": "skipped",
        "test_hang": "not measured",
    }
    assert results["test_hang"]["reason"] == "budget: not done within 6 s"
    assert results["test_crash"]["reason"] == "the process ended in it: killed by SIGSEGV"
    assert results["test_torn_line"]["reason"] == "the process ended in it: exit status 0"
    assert "one is not two" in results["test_wrong"]["reason"] and results["test_absent"]["reason"] == "not here"
    assert "while it was torn down" in results["test_teardown"]["reason"]
    # A value of each parameter before the second case of any, the library's kernels before plain PyTorch.
    order = [name for name in results if "target" in name]
    assert [name[-11:-1] for name in order] == ["riton-cuda", "riton-cuda", "eager-cuda", "eager-cuda"]


def test_processes_share_the_items(suite: Path) -> None:
    results, _ = _run(suite, "right or target or wrong", shards=2)
    assert len(results) == 6 and all((suite / f"items-{index}.jsonl").stat().st_size for index in range(2))


def test_items_beyond_the_time_are_named(suite: Path) -> None:
    """The time is over in the test that hangs, however long the machine took to get there."""
    results, left = _run(suite, "right or hang or teardown", seconds=0.0)
    assert left == NO_TIME and {result["reason"] for result in results.values()} <= {NO_TIME}


def test_a_process_that_does_not_start_is_not_tried_for_ever(suite: Path) -> None:
    (suite / "conftest.py").write_text("raise SystemExit('no such device')\n")
    results, left = _run(suite, "right")
    assert results == {} and left is not None and left.startswith("exit status")
    (suite / "conftest.py").write_text("import time\ntime.sleep(600)\n")
    results, left = _run(suite, "right", start_budget=1.0)
    assert results == {} and left is not None and left.startswith("not started within 1 s")


def _until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def _running(word: str) -> bool:
    """Whether a process has this among its arguments."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in entry.read_text():
                return True
        except OSError:
            continue
    return False


def test_a_hanging_child_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    grandchild = f"import time; open({str(alive)!r}, 'w').close(); time.sleep(600)"
    program = (
        f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    child = Child([sys.executable, "-c", program], tmp_path / "log")
    _until(alive.exists)
    began = time.monotonic()
    assert child.wait(began + 0.3).startswith("not done within")
    assert time.monotonic() - began < 6 and child.status() == -signal.SIGKILL and child.tail() == "begun"
    _until(lambda: not _running(str(alive)), 20)


def test_how_a_process_ended() -> None:
    ends = [runner.how_it_ended(status) for status in (3, -9, -250, None)]
    assert ends == ["exit status 3", "killed by SIGKILL", "killed by signal 250", "does not end even when killed"]
