"""Child processes with a budget, and pytest in them: an item that hangs or crashes costs itself and no other."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_TIME = "no time left"

_TAIL = 4000  # characters of a child's output that are kept
_POLL = 0.05
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
# Imports torch and collects the items, with a cold page cache.
_START_BUDGET = 120.0
_ITEM_BUDGET = 60.0


def _own_group_that_dies_with_us() -> None:
    """Between fork and exec: a process group of its own, and an end with the parent's, even by SIGKILL."""
    os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A running command.

    Args:
        command: program and arguments.
        log: the file that both streams are appended to.
        environment: variables set in addition to this process's own.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.began = time.monotonic()
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                preexec_fn=_own_group_that_dies_with_us,
            )

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def kill(self) -> None:
        """Ends it and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A process in an uninterruptible call of the driver may stay; it must not block this one.
            self._process.wait(timeout=5)

    def wait(self, deadline: float) -> str:
        """Waits until it ends, or kills it at the deadline; returns how it ended, "" for success."""
        try:
            while self.status() is None:
                if time.monotonic() > deadline:
                    late = self.seconds()
                    self.kill()
                    return f"not done within {late:.0f} s"
                time.sleep(_POLL)
            return how_it_ended(self.status()) if self.status() else ""
        except BaseException:
            self.kill()
            raise

    def output(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def tail(self) -> str:
        return self.output()[-_TAIL:].strip()

    def last_line(self) -> str:
        """The message of a Python that failed."""
        return (self.tail().splitlines() or ["no output"])[-1][:300]


def how_it_ended(status: int | None) -> str:
    if status is None:
        return "does not end even when killed"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"


Unit = dict[str, Any]
Result = dict[str, Any]


@dataclass
class Items:
    """Runs the items of a pytest command in child processes, until they are done or the time is over.

    Attributes:
        arguments: of pytest.
        folder: for the files of items and the logs.
        name: of these files.
        finished: called once per item with its node id, its unit and its result, as soon as it is known. A result has
            `status` ("ok", "failed", "not measured", "skipped"), `seconds`, `reason` unless it is ok, and the record.
        shards: processes that share the items.
        environment: variables set for the children.
        prefix: a command that runs the children, e.g. a sanitizer.
        collect_only: runs none of the items.
        collected: how many items there are, as soon as it is known.
        output: of the children, after the run.
    """

    arguments: Sequence[str]
    folder: Path
    name: str
    finished: Callable[[str, Unit, Result], None] = lambda name, unit, result: None
    shards: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    start_budget: float = _START_BUDGET
    item_budget: float = _ITEM_BUDGET
    collect_only: bool = False
    collected: int = 0
    output: str = ""

    def run(self, deadline: float) -> str | None:
        """Returns why items were left, or None if each had its turn."""
        shards = [_Shard(self, index) for index in range(self.shards)]
        running = shards
        try:
            while running and time.monotonic() < deadline:
                running = [shard for shard in running if not shard.poll()]
                time.sleep(_POLL)
        finally:
            for shard in shards:
                shard.close(NO_TIME if shard in running else shard.reason)
        self.output = "\n".join(shard.child.output() for shard in shards)
        reasons = Counter(NO_TIME if shard in running else shard.reason for shard in shards)
        return next((reason for reason in reasons if reason), None)


class _Shard:
    """A part of the items, in one process at a time; an end in the middle of an item begins the next process."""

    def __init__(self, items: Items, index: int) -> None:
        self._items = items
        self._file = items.folder / f"{items.name}-{index}.jsonl"
        self._file.unlink(missing_ok=True)
        self._log = items.folder / f"{items.name}-{index}.log"
        self._environment = {
            "PYTEST_ADDOPTS": "",
            "ITEMS_FILE": str(self._file),
            "ITEMS_SHARD": f"{index}/{items.shards}",
            **items.environment,
        }
        self.units: dict[str, Unit] = {}
        self._collected = False
        self.reason = ""
        self._done: set[str] = set()
        self._offset = 0
        self._begin()

    def _begin(self) -> None:
        command = [*self._items.prefix, sys.executable, "-m", "pytest", *self._items.arguments]
        command += ["--collect-only"] if self._items.collect_only else []
        command += ["-p", "benchmarks.plugin", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
        self.child = Child(command, self._log, self._environment)
        self._current: str | None = None
        self._since, self._limit = time.monotonic(), self._items.start_budget
        self._progressed = False

    def poll(self) -> bool:
        """Takes what is new; returns whether nothing is left to run."""
        status = self.child.status()  # before the file: an ended process has written all of its lines
        self._read()
        late = time.monotonic() - self._since > self._limit
        if status is None and not late:
            return False
        if status is None:
            self.child.kill()
            why = {"status": "not measured", "reason": f"budget: not done within {self._limit:.0f} s"}
        else:
            why = {"status": "failed", "reason": f"the process ended in it: {how_it_ended(status)}"}
            why["output"] = self.child.tail()[-1500:]
        if self._current is not None:
            self._end(self._current, why)
        if self._collected and (self._items.collect_only or len(self._done) == len(self.units)):
            return True
        if not self._progressed:
            how = f"not started within {self._limit:.0f} s" if late else how_it_ended(status)
            self.reason = f"{how}; {self.child.last_line()}"
            return True
        self._begin()
        return False

    def close(self, reason: str) -> None:
        """Ends the process; the items that had no turn get the reason."""
        self.child.kill()
        self._read()
        for name in self.units:
            if name not in self._done:
                self._end(name, {"status": "not measured", "reason": reason or "no reason known"})

    def _read(self) -> None:
        """The whole lines since the last call; a torn last line is one that its process did not end."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in map(json.loads, whole.splitlines()):
            self._progressed, self._since = True, time.monotonic()
            if "collected" in line:
                self.units, self._collected = line["collected"], True
                self._items.collected += len(self.units)
            elif "begin" in line:
                self._current, self._limit = line["begin"], line["budget"] or self._items.item_budget
            else:
                self._current, self._limit = None, self._items.start_budget
                outcome = {"passed": "ok", "failed": "failed"}.get(line["outcome"], "skipped")
                if outcome == "skipped" and self.units[line["end"]]:
                    outcome = "not measured"
                result = {"status": outcome, "seconds": line["seconds"], **line["record"]}
                self._end(line["end"], result | ({"reason": line["message"]} if "message" in line else {}))

    def _end(self, name: str, result: Result) -> None:
        self._current = None
        if name not in self._done:  # a failed teardown comes after its test
            self._done.add(name)
            self._items.finished(name, self.units.get(name, {}), result)
