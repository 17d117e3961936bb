"""A pytest plugin: one line of JSON when a test begins and one when it ends, in the file that OUTCOMES_FILE names.

Whoever reads it knows what was tested when the time was over, and in which test the process crashed. Tests that the
file has already are left out, so that a second run goes on where the first one ended. OUTCOMES_SHARD names a part of
them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(os.environ["OUTCOMES_FILE"])
# "2/8": of the tests in their order the third, the eleventh and so on.
_INDEX, _COUNT = map(int, os.environ.get("OUTCOMES_SHARD", "0/1").split("/"))


def _say(line: dict[str, Any]) -> None:
    with _FILE.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _done() -> set[str]:
    if not _FILE.exists():
        return set()
    return {line["begin"] for line in map(json.loads, _FILE.read_text().splitlines()) if "begin" in line}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """One case of each test function before the second of any, and the library's kernels before plain PyTorch."""
    seen: Counter[str] = Counter()
    order: dict[str, tuple[bool, int]] = {}
    for item in items:
        function = item.nodeid.partition("[")[0] + ("/eager" if "eager-" in item.nodeid else "")
        order[item.nodeid] = ("eager-" in item.nodeid, seen[function])
        seen[function] += 1
    items[:] = sorted(items, key=lambda item: order[item.nodeid])[_INDEX::_COUNT]
    done = _done()
    if not done:
        _say({"collected": len(items)})
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    _say({"begin": nodeid})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    # A test ends with its call, or with the setup that skipped or failed it; a teardown counts where it fails.
    if report.when == "call" or report.outcome != "passed":
        line = {"end": item.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            line["message"] = _message(report)
        elif report.skipped:
            line["message"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        _say(line)
    if report.failed and _context_lost():
        item.session.shouldstop = "the CUDA context is lost: the next test needs another process"


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr))[:600]


def _context_lost() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
