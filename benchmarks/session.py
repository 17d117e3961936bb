"""A run: the machine, selections of the suite in child processes, and a file that is written after every item."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.report import format_seconds
from benchmarks.runner import NO_TIME, ROOT, Child, Items


class Outcome(Exception):  # noqa: N818 - not every outcome is an error
    """How a part of a run ended, if not well: "failed" or "skipped", the reason, and output for the file."""

    def __init__(self, status: str, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.entry = {"status": status, "reason": reason, **({"output": output[-4000:]} if output else {})}


class Session:
    """One run and its file.

    Args:
        output: the file, written after every item.
        logs: a folder for the output of the children.
        device: "cpu", "cuda", "cuda:N" or "auto".
        options: of pytest, for every selection.
        variables: set for every child.
        dry_run: maps of a few pixels.
    """

    def __init__(
        self,
        output: Path,
        logs: Path,
        device: str,
        *options: str,
        variables: Mapping[str, str] | None = None,
        dry_run: bool = False,
    ) -> None:
        self.logs, self.device, self.variables = logs, device, dict(variables or {})
        self.options = [f"--device={device}", *options, *(["--small"] if dry_run else [])]
        self.document = records.empty(dry_run=dry_run, date=time.strftime("%Y-%m-%dT%H:%M:%S"))
        self.path, self.began = output, time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def save(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.began, 1)
        records.write(self.document, self.path)

    def find_machine(self, deadline: float) -> None:
        """The machine and the versions, found by a child; raises `Outcome` if it fails."""
        child = Child([sys.executable, "-m", "benchmarks.machine", self.device], self.logs / "environment.log")
        ended = child.wait(deadline)
        if ended:
            raise Outcome("failed", f"{ended}; {child.last_line()}", child.tail())
        self.document["environment"] = json.loads(child.output().splitlines()[-1])  # after warnings of torch

    def suite(
        self, select: str, deadline: float, *options: str, prefix: Sequence[str] = (), **variables: str
    ) -> tuple[str, str]:
        """Runs the items of a selection, one line and one entry of the file each.

        Args:
            select: a preset or a part (`cases.py`), or another selection of `conftest.py`.
            deadline: of `time.monotonic`.
            options, variables: in addition to those of the session.
            prefix: a command that runs pytest.

        Returns:
            A remark with the number of items by status, and the output of the children.

        Raises:
            Outcome: an item failed, or there was none.
        """
        statuses: Counter[str] = Counter()
        began, last_failure = time.monotonic(), ""

        def finished(name: str, unit: Mapping[str, Any], result: Mapping[str, Any]) -> None:
            nonlocal last_failure
            kinds = f"{unit.get('kind')}s"
            if kinds in records.LISTS and (kinds != "ceilings" or result["status"] == "ok"):
                self.document[kinds].append({**unit, **result})
            self.save()
            statuses[result["status"]] += 1
            times, shown = result.get("device") or result.get("caller"), result["status"]
            if times:
                shown = (f"{times['ratio']:.2f}x " if "ratio" in times else "") + format_seconds(times["own"])
            elif shown != "ok":
                shown += f": {result['reason']}"
                last_failure = result["reason"] if result["status"] == "failed" else last_failure
            left = (time.monotonic() - began) * (items.collected / statuses.total() - 1)
            self.say(f"  {unit.get('id', name)}  {shown}" + (f", about {format_seconds(left)} left" if left else ""))

        plugin = ["--benchmark-disable-gc", "--benchmark-quiet"] if importlib.util.find_spec("pytest_benchmark") else []
        command = [str(ROOT / "benchmarks"), f"--select={select}", *plugin, *self.options, *options]
        items = Items(command, self.logs, select, finished, environment={**self.variables, **variables}, prefix=prefix)
        left = items.run(deadline)
        if not items.collected:
            raise Outcome("failed" if left and left != NO_TIME else "skipped", left or "no row matches", items.output)
        counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
        if statuses["failed"]:
            raise Outcome("failed", f"{counts}; {last_failure}", items.output)
        if left and left != NO_TIME:
            raise Outcome("failed", left, items.output)
        return counts + (f" ({left})" if left else ""), items.output
