"""The steps of a run, in order of value, each with its share of the time that is left."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import document as documents
from benchmarks.gpu import rows
from benchmarks.gpu.checks import StepFailed, StepSkipped, processes_for_tests, run_sanitizer, run_tests
from benchmarks.gpu.children import Child
from benchmarks.gpu.document import Document
from benchmarks.gpu.rows import Plan, Unit
from benchmarks.gpu.units import NO_TIME, Pool

ROOT = Path(__file__).resolve().parents[2]

# Seconds kept for the end: the last file, the table.
_CLOSING = 6.0
_SAVE_EVERY = 2.0


@dataclass(frozen=True)
class Step:
    """One part of a run.

    Attributes:
        name: what it is called.
        action: does it, and ends by the time (of `time.monotonic`) that it is given; returns a remark or None.
        reserve: seconds that the steps before it leave to it.
        most: seconds that it gets at most.
    """

    name: str
    action: Callable[[float], str | None]
    reserve: float
    most: float


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        output: the JSON.
        logs: a folder for what the children print.
        seconds: when the run ends, counted from its start.
        dry_run: on the CPU, with maps of a few pixels.
        only: names of steps; empty is all of them. "environment" always runs.
        pattern: rows and smoke units whose name this regular expression does not match are left out.
        commit: of the sources, where the tree is no clone.
        earlier: a document to go on with: what it has of rows, and of steps that are not run again, is kept.
    """

    output: Path
    logs: Path
    seconds: float
    dry_run: bool = False
    only: tuple[str, ...] = ()
    pattern: str = ""
    commit: str | None = None
    earlier: Document | None = None


class Run:
    """One run; `execute` leaves its document in the file after every step."""

    def __init__(self, options: Options, say: Callable[[str], None] = print) -> None:
        self.options, self.say = options, say
        self.began = time.monotonic()
        self.end = self.began + options.seconds - _CLOSING
        date = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.document: Document = documents.empty(
            dry_run=options.dry_run, date=date, limit_seconds=round(options.seconds, 1)
        )
        self.device = "cpu" if options.dry_run else "cuda"
        self._saved = 0.0
        self._mismatch: str | None = None
        self.steps = self._steps()

    def _steps(self) -> tuple[Step, ...]:
        """In order of value; what one leaves over goes to the next."""
        sanitized = 0.0 if shutil.which("compute-sanitizer") is None else 60.0
        return (
            Step("environment", self._environment, 15, 60),
            Step("build", self._build, 20, 180),
            Step("smoke", self._smoke, 25, 45),
            Step("tests", self._tests, 40, 110),
            Step("ceilings", self._ceilings, 15, 30),
            Step("headline", self._headline, 60, 130),
            Step("max-autotune", self._max_autotune, 25, 80),
            Step("candidates", self._candidates, 20, 70),
            Step("others", self._others, 20, 1e9),
            Step("sanitizer", self._sanitizer, sanitized, 1e9),
        )

    def execute(self) -> Document:
        """All steps; an interruption ends them, and the document says so."""
        self.save()
        for index, step in enumerate(self.steps):
            if step.name == "environment" or not self.options.only or step.name in self.options.only:
                later = [s for s in self.steps[index + 1 :] if not self.options.only or s.name in self.options.only]
                self._one(step, sum(s.reserve for s in later))
            if reason := self.pointless():
                self.say(reason)
                break
        self.document["complete"] = True
        self.save()
        return self.document

    def pointless(self) -> str | None:
        """Why no further step can do anything; a machine of which nothing is known is given a try."""
        found = self.document["environment"]
        if found and not found.get("gpu") and not self.options.dry_run:
            return "no NVIDIA GPU that PyTorch can use: nothing further to run (--dry-run walks the steps)"
        return self._mismatch

    def _one(self, step: Step, reserved: float) -> None:
        began = time.monotonic()
        left = self.end - began
        # Where there is less than all of them need, each gets its part.
        part = left * step.reserve / (step.reserve + reserved) if step.reserve else 0.0
        budget = min(step.most, max(left - reserved, part))
        entry: dict[str, Any] = {"name": step.name, "status": "ok", "seconds": 0.0, "budget": round(budget, 1)}
        if budget < 1:
            entry |= {"status": "skipped", "reason": NO_TIME}
        else:
            self.say(f"[{began - self.began:4.0f} s] {step.name}, up to {budget:.0f} s")
            try:
                remark = step.action(began + budget)
                entry |= {"reason": remark} if remark else {}
            except StepSkipped as reason:
                entry |= {"status": "skipped", "reason": str(reason)}
            except StepFailed as failure:
                entry |= {"status": "failed", "reason": str(failure.args[0])}
                entry |= {"output": failure.args[1]} if failure.args[1:] else {}
            except Exception as error:
                entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
                entry["output"] = traceback.format_exc()[-2000:]
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.say(f"         {entry['status']}{': ' + entry['reason'] if entry.get('reason') else ''}")
        self.document["steps"].append(entry)
        self.save()

    def save(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.began, 1)
        documents.write(self.document, self.options.output)
        self._saved = time.monotonic()

    def _child(
        self, command: Sequence[str], log: str, deadline: float, environment: dict[str, str] | None = None
    ) -> Child:
        """Runs a command until it ends or the deadline passes; `status()` is then that of a killed one."""
        child = Child(command, self.options.logs / log, ROOT, environment)
        child.wait(deadline - time.monotonic())
        return child

    def _environment(self, deadline: float) -> str | None:
        command = [sys.executable, "-m", "benchmarks.gpu.environment", "--device", self.device]
        child = self._child(command, "environment.log", deadline)
        if child.status() != 0:
            raise StepFailed(f"{child.how_it_ended()}; {child.last_line()}", child.tail())
        # Warnings of torch's may stand before it.
        found = json.loads(child.output().splitlines()[-1])
        found["commit"] = found["commit"] or self.options.commit
        if not self.document["environment"] and self.options.earlier:
            self._go_on_with(self.options.earlier, found)
        self.document["environment"] = found
        return None

    def _go_on_with(self, earlier: Document, now: dict[str, Any]) -> None:
        """Takes over the rows that were measured, and whole steps of those that are not run again."""
        for name in ("gpu", "torch", "triton", "commit"):
            if earlier["environment"].get(name) != now[name]:
                before = earlier["environment"].get(name)
                self._mismatch = f"not the {name} of the run to go on with: {now[name]!r} here, {before!r} there"
                raise StepFailed(self._mismatch)
        for name in ("smoke", "tests", "sanitizer", "candidates"):
            if self.options.only and name not in self.options.only:
                self.document[name] = earlier[name]
        self.document["ceilings"] = list(earlier["ceilings"])
        self.document["rows"] = [row for row in earlier["rows"] if row["status"] == "ok"]
        self.document["steps"] = [{**step, "earlier": True} for step in earlier["steps"]]

    def _build(self, deadline: float) -> str | None:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        child = self._child(command, "build.log", deadline)
        said = [line.removeprefix("fpn_kernels: ") for line in child.output().splitlines() if "fpn_kernels: " in line]
        remark = "; ".join(said)
        if child.status() != 0 or "its build failed" in remark:
            raise StepFailed(f"{child.how_it_ended()}; {remark or child.last_line()}", child.tail())
        if "left out" in remark:
            raise StepSkipped(remark)
        # Backends are what the build may have added: looked up again.
        self._environment(deadline)
        return remark or None

    def _pool(
        self, finished: Callable[[Unit, dict[str, Any]], None], environment: dict[str, str] | None = None
    ) -> Pool:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", self.device]
        return Pool(command, self.options.logs, ROOT, environment or {}, finished)

    def _units(
        self,
        units: Sequence[Unit],
        deadline: float,
        entries: list[dict[str, Any]],
        environment: dict[str, str] | None = None,
    ) -> str | None:
        """Runs units, an entry of the document each; a remark where some were left or failed."""
        done = {entry["id"] for entry in entries}
        chosen = [unit for unit in units if re.search(self.options.pattern, unit["id"]) and unit["id"] not in done]
        if not chosen:
            raise StepSkipped("nothing of it is left to do, is asked for, or can be done here")
        statuses: Counter[str] = Counter()
        reasons: set[str] = set()

        def finished(unit: Unit, result: dict[str, Any]) -> None:
            entries.append({**unit, **result})
            statuses[result["status"]] += 1
            if result["status"] == "failed" and result["reason"] not in reasons:  # said once, not of every unit
                reasons.add(result["reason"])
                self.say(f"         failed: {unit['id']}: {result['reason']}")
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self.save()

        left = self._pool(finished, environment).run(chosen, deadline)
        counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
        if statuses["failed"]:
            raise StepFailed(counts)
        return counts + (f" ({left})" if left else "")

    def _plan(self) -> Plan:
        """With a column for each backend only where more than one of them was seen to serve this device."""
        names = self.document["environment"].get("providers", Plan.providers)
        served = {unit["backend"] for unit in self.document["smoke"] if unit["status"] == "ok" and unit["backend"]}
        if self.document["smoke"] and len(served) < 2:
            names = [name for name in names if "/" not in name]
        return Plan(self.options.dry_run, tuple(names))

    def _smoke(self, deadline: float) -> str | None:
        units = rows.smoke(self.options.dry_run, self._backends())
        return self._units(units, deadline, self.document["smoke"])

    def _backends(self) -> list[str]:
        found: list[str] = self.document["environment"].get("measured_backends", ["triton"])
        return found

    def _ceilings(self, deadline: float) -> str | None:
        found: list[dict[str, Any]] = []
        try:
            pool = self._pool(lambda unit, result: found.append({**unit, **result}))
            pool.run(rows.ceilings(self.options.dry_run), deadline)
        finally:
            self.document["ceilings"] += [entry for entry in found if entry["status"] == "ok"]
        missing = [f"{entry['id']}: {entry['reason']}" for entry in found if entry["status"] != "ok"]
        if missing:
            raise StepFailed(f"{len(missing)} of {len(found)}; {missing[0]}")
        return None

    def _headline(self, deadline: float) -> str | None:
        return self._units(self._plan().headline(), deadline, self.document["rows"])

    def _max_autotune(self, deadline: float) -> str | None:
        return self._units(self._plan().max_autotune(), deadline, self.document["rows"])

    def _candidates(self, deadline: float) -> str | None:
        if "triton" not in self._backends():
            raise StepSkipped("Triton is not here")
        # A cache of its own: what an earlier process found is measured again.
        environment = {"FPN_KERNELS_AUTOTUNE": "all", "XDG_CACHE_HOME": str(self.options.logs / "autotune")}
        units = rows.candidates(self.options.dry_run)
        return self._units(units, deadline, self.document["candidates"], environment)

    def _others(self, deadline: float) -> str | None:
        return self._units(self._plan().others(), deadline, self.document["rows"])

    def _tests(self, deadline: float) -> str | None:
        chosen = ["tests/test_upsample_add.py"] if self.options.dry_run else []
        dry, logs = self.options.dry_run, self.options.logs
        processes = 1 if dry else processes_for_tests()
        return run_tests(self.document["tests"], logs, chosen, deadline, dry_run=dry, processes=processes)

    def _sanitizer(self, deadline: float) -> str | None:
        sample = rows.sample(self._backends())
        return run_sanitizer(self.document["sanitizer"], self.options.logs, sample, self.device, deadline)
