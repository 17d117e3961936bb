"""Many small measurements in worker processes: one that hangs or crashes costs itself and no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.children import Child, how_it_ended
from benchmarks.gpu.rows import Unit

# What a worker exits with when its CUDA context is of no more use: the next unit needs another process.
CONTEXT_LOST = 75

_POLL = 0.05
# Importing torch and reaching the device, where nothing is in the page cache yet.
_START_BUDGET = 90.0
_MOST_FAILED_STARTS = 2

NO_TIME = "no time left"


@dataclass
class Pool:
    """Runs units, one at a time, until they are done or the time is over.

    Attributes:
        command: a worker's command line, to which the paths of its units and of its results are added.
        folder: where those files and the log go.
        cwd: the workers' working directory.
        environment: variables set for the workers.
        finished: called with each unit and its result as soon as it is there.
    """

    command: Sequence[str]
    folder: Path
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)
    finished: Callable[[Unit, dict[str, Any]], None] = lambda unit, result: None
    start_budget: float = _START_BUDGET

    def run(self, units: Sequence[Unit], deadline: float) -> str | None:
        """Every unit ends in one call of `finished`, at the latest at `deadline` (of `time.monotonic`).

        Returns:
            Why units were left, or None where each had its turn.
        """
        pending = list(units)
        failed_starts, attempt = 0, 0
        while pending and time.monotonic() < deadline:
            attempt += 1
            before = len(pending)
            reason = self._worker(pending, deadline, attempt)
            failed_starts = failed_starts + 1 if len(pending) == before else 0
            if failed_starts == _MOST_FAILED_STARTS:
                return self._leave(pending, f"the worker does not start: {reason}", "failed")
        return self._leave(pending, NO_TIME, "not measured")

    def _leave(self, pending: list[Unit], reason: str, status: str) -> str | None:
        for unit in pending:
            self.finished(unit, {"status": status, "reason": reason})
        return reason if pending else None

    def _worker(self, pending: list[Unit], deadline: float, attempt: int) -> str:
        """One worker, from its start to its end; takes from `pending` what it finished or stopped in."""
        name = f"{time.monotonic_ns()}-{attempt}"
        todo, results = self.folder / f"units-{name}.json", self.folder / f"results-{name}.jsonl"
        todo.write_text(json.dumps(pending))
        results.touch()
        command = [*self.command, str(todo), str(results)]
        child = Child(command, self.folder / "workers.log", self.cwd, self.environment)
        try:
            return self._follow(child, results, pending, deadline)
        finally:
            child.kill()

    def _follow(self, child: Child, results: Path, pending: list[Unit], deadline: float) -> str:
        lines, current, since = 0, None, time.monotonic()
        while True:
            status = child.status()  # before the lines are read: what an ended worker wrote is all there
            text = results.read_text()
            complete = text[: text.rfind("\n") + 1].splitlines()
            for line in complete[lines:]:
                said = json.loads(line)
                since = time.monotonic()
                if "begin" in said:
                    current = next(unit for unit in pending if unit["id"] == said["begin"])
                else:
                    self._take(pending, said.pop("end"), said)
                    current = None
            lines = len(complete)
            now = time.monotonic()
            limit = current["budget"] if current else self.start_budget
            if status is None and now < deadline and now - since <= limit:
                time.sleep(_POLL)
                continue
            return self._ended(child, status, current, pending, now >= deadline, limit)

    def _ended(
        self, child: Child, status: int | None, current: Unit | None, pending: list[Unit], late: bool, limit: float
    ) -> str:
        if status is None:
            child.kill()
            if late:
                reason = (
                    NO_TIME if current is None else f"{NO_TIME}: stopped after {child.seconds():.0f} s of its worker"
                )
                result = {"status": "not measured", "reason": reason}
            else:
                reason = f"budget: not done within {limit:.0f} s"
                result = {"status": "not measured", "reason": reason}
        else:
            reason = f"the worker ended: {how_it_ended(status)}"
            result = {"status": "failed", "reason": reason, "output": child.tail()[-1500:]}
        if current is not None:
            self._take(pending, current["id"], result)
        return reason if status == 0 else f"{reason}; {child.last_line()}"

    def _take(self, pending: list[Unit], name: str, result: dict[str, Any]) -> None:
        unit = next(unit for unit in pending if unit["id"] == name)
        pending.remove(unit)
        self.finished(unit, result)
