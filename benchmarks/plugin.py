"""A pytest plugin: one line of JSON when an item begins and one when it ends, in the file ITEMS_FILE.

The reader knows what ran when the time was over, and in which item the process crashed. Items that the file has are
deselected, so that a second process continues after the first. ITEMS_SHARD is the part of the items to run, e.g. "2/8".
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(os.environ["ITEMS_FILE"])
_INDEX, _COUNT = map(int, os.environ.get("ITEMS_SHARD", "0/1").split("/"))

_LINE = pytest.StashKey[dict[str, Any]]()


def _write(line: dict[str, Any]) -> None:
    with _FILE.open("a") as file:
        file.write(json.dumps(line) + "\n")


def unit(item: pytest.Item) -> dict[str, Any]:
    """The description of a benchmark's item (`conftest.py`); of a test, nothing."""
    found: dict[str, Any] = dict(item.user_properties).get("unit", {})  # type: ignore[assignment]
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    lines = _FILE.read_text().splitlines(keepends=True) if _FILE.exists() else []
    if lines and not lines[-1].endswith("\n"):  # torn by the end of its process
        _FILE.write_text("".join(lines[:-1]))
    begun = {line["begin"] for line in map(json.loads, (x for x in lines if x.endswith("\n"))) if "begin" in line}
    items[:] = sorted(items, key=_rounds(items).__getitem__)[_INDEX::_COUNT]
    if not lines:
        _write({"collected": {item.nodeid: unit(item) for item in items}})
    items[:] = [item for item in items if item.nodeid not in begun]


def _rounds(items: list[pytest.Item]) -> dict[pytest.Item, tuple[bool, int]]:
    """Tests in rounds: first the cases with a parameter's value that no earlier case of the test has, and so on.

    A run that is cut short then has met every operator, dtype, layout and mode. Plain PyTorch comes last. Benchmarks
    keep their order.
    """
    seen: Counter[tuple[str, str, str]] = Counter()
    rounds: dict[pytest.Item, tuple[bool, int]] = {}
    for item in items:
        if unit(item):
            rounds[item] = (False, 0)
            continue
        eager = "eager-" in item.nodeid
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = [(f"{item.nodeid.partition('[')[0]} {eager}", name, repr(value)) for name, value in params.items()]
        rounds[item] = (eager, min((seen[value] for value in values), default=0))
        seen.update(values)
    return rounds


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    _write({"begin": item.nodeid, "budget": unit(item).get("budget")})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    line = item.stash.setdefault(_LINE, {"end": item.nodeid, "outcome": "passed", "seconds": 0.0})
    line["seconds"] += report.duration
    if report.outcome != "passed" and line["outcome"] == "passed":
        line |= {"outcome": report.outcome, "message": _message(report)}
    if report.when == "teardown":
        record = dict(item.user_properties).get("record", {})
        _write({**line, "seconds": round(line["seconds"], 3), "record": record})
    if report.failed and _context_lost():
        item.session.shouldstop = "the CUDA context is lost: the next item needs another process"


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # skipped
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr))[:600]


def _context_lost() -> bool:
    """After an illegal access every later call of the process fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
