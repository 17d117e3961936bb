"""The GPU run (benchmarks/gpu.sh): its parts in order of value, each with its share of the time.

First whether the results are right (tests, sanitizer), then the rows that most users run, those that earlier runs
missed, and the experiments. The file is written after every item, so that an end at any moment loses at most one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import documents, prepare, records, report
from benchmarks.runner import NO_TIME, ROOT, Child, Items
from benchmarks.session import Outcome, Session

LATEST = records.RESULTS / "gpu-latest.json"

_CLOSING = 6.0  # seconds for the last file and the report
_MAX_FAILURES = 100
_ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) error", re.MULTILINE)

# Takes a time of `time.monotonic` by which it ends; returns a remark or None.
Action = Callable[[float], "str | None"]


class Run(Session):
    """A session of parts.

    Args:
        output, logs, dry_run: as of `Session`; a dry run is on the CPU.
        seconds: the run ends so long after its start.
        only: names of parts; empty is all of them. "environment" always runs.
        words: of pytest's -k, for the rows.
        commit: of the sources, if they are no git clone.
    """

    def __init__(
        self,
        output: Path,
        logs: Path,
        seconds: float,
        *,
        dry_run: bool = False,
        only: Sequence[str] = (),
        words: str = "",
        commit: str | None = None,
    ) -> None:
        prepared = {} if dry_run else prepare.environment()
        options = [f"--seconds={0.001 if dry_run else 0.25}", *(["-k", words] if words else [])]
        device = "cpu" if dry_run else "cuda"
        super().__init__(output, logs, device, *options, variables=prepared, dry_run=dry_run)
        self.dry_run, self.only, self.commit, self.end = dry_run, only, commit, self.began + seconds - _CLOSING
        # Name to seconds in a run of eight minutes, and action. Later parts get what a part leaves.
        self.parts: dict[str, tuple[float, Action]] = {
            "environment": (15, self._environment),
            "build": (5 if prepared else 120, self._build),
            "tests": (130, self._tests),
            "sanitizer": (25, self._sanitizer),
            "ceilings": (20, lambda deadline: self.suite("ceilings", deadline)[0]),
            "users": (110, lambda deadline: self.suite("users", deadline)[0]),
            "missed": (80, lambda deadline: self.suite("missed", deadline)[0]),
            "experiments": (40, self._experiments),
            "others": (25, lambda deadline: self.suite("others", deadline)[0]),
            "tuned": (25, lambda deadline: self.suite("tuned", deadline)[0]),
        }

    def execute(self) -> None:
        """All parts; a failure ends none but its own."""
        self.save()
        chosen = [name for name in self.parts if name == "environment" or not self.only or name in self.only]
        for index, name in enumerate(chosen):
            self._one(name, sum(self.parts[later][0] for later in chosen[index:]))
            if reason := self.no_gpu():
                self.say(reason)
                break
        self.document["complete"] = True
        self.save()

    def no_gpu(self) -> str | None:
        """Why no further part can do anything; a machine of which nothing is known gets a try."""
        found = self.document["environment"]
        if found and not found.get("gpu") and not self.dry_run:
            return "no NVIDIA GPU that PyTorch can use: nothing further to run (--dry-run runs the parts on a CPU)"
        return None

    def _one(self, name: str, shares: float) -> None:
        (share, action), began = self.parts[name], time.monotonic()
        budget = (self.end - began) * share / shares
        entry: dict[str, Any] = {"name": name, "status": "ok", "seconds": 0.0, "budget": round(budget, 1)}
        try:
            if budget < 1:
                raise Outcome("skipped", NO_TIME)
            self.say(f"[{began - self.began:4.0f} s] {name}, up to {budget:.0f} s")
            remark = action(began + budget)
            entry |= {"reason": remark} if remark else {}
        except Outcome as outcome:
            entry |= outcome.entry
        except Exception as error:
            entry |= Outcome("failed", f"{type(error).__name__}: {error}", traceback.format_exc()).entry
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.say(f"         {entry['status']}{': ' + entry['reason'] if entry.get('reason') else ''}")
        self.document["parts"].append(entry)
        self.save()

    def _environment(self, deadline: float) -> str | None:
        self.find_machine(deadline)
        found = self.document["environment"]
        found["commit"] = found["commit"] or self.commit
        return prepare.mismatch(found) if self.variables else None

    def _build(self, deadline: float) -> str | None:
        if "FPN_KERNELS_LIBRARY" in self.variables:
            raise Outcome("skipped", "prepared beforehand")
        child = Child([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], self.logs / "build.log")
        ended = child.wait(deadline)
        said = [line.removeprefix("fpn_kernels: ") for line in child.output().splitlines() if "fpn_kernels: " in line]
        remark = "; ".join(said)
        if ended or "its build failed" in remark:
            raise Outcome("failed", f"{ended or 'exit status 0'}; {remark or child.last_line()}", child.tail())
        if "left out" in remark:
            raise Outcome("skipped", remark)
        self._environment(deadline)  # the build may have added a backend
        return remark or None

    def _tests(self, deadline: float) -> str | None:
        """The tests marked `gpu`; those of one file in a dry run, where all of them are skipped."""
        processes = 1 if self.dry_run else max(1, min(8, (os.cpu_count() or 1) * 3 // 4))
        return self.run_tests("tests/ops/test_contract.py" if self.dry_run else "tests", deadline, processes)

    def run_tests(self, path: str, deadline: float, processes: int) -> str | None:
        """Fills the counts of the document; fails if a test failed, or if none passed."""
        counts: dict[str, Any] = self.document["tests"]
        counts |= dict.fromkeys(("collected", "passed", "failed", "skipped", "crashed", "not_run"), 0)
        counts["failures"] = []

        def finished(name: str, unit: Mapping[str, Any], result: Mapping[str, Any]) -> None:
            kind, reason = result["status"], result.get("reason", "no message")
            if kind == "not measured":
                kind = "failed" if reason.startswith("budget") else "not_run"
            elif reason.startswith("the process ended"):
                kind = "crashed"
            counts["passed" if kind == "ok" else kind] += 1
            if kind in ("failed", "crashed"):
                counts["failures"] = [*counts["failures"], {"test": name, "message": reason}][:_MAX_FAILURES]
                self.save()

        command = [path, "-m", "gpu", "-q", "--tb=short"]
        items = Items(command, self.logs, "tests", finished, shards=processes, environment=self.variables)
        left = items.run(deadline)
        counts["collected"] = items.collected
        if not items.collected:
            raise Outcome("failed", f"no test was collected: {left}", items.output)
        said = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped", "crashed"))
        said += f", {counts['not_run']} of {counts['collected']} not run"
        if counts["failed"] or counts["crashed"] or not (counts["passed"] or self.dry_run):
            raise Outcome("failed", said)
        return said + (f" ({left})" if left else "")

    def _experiments(self, deadline: float) -> str | None:
        """`python -m experiments`; its table is in the log."""
        if self.dry_run:
            raise Outcome("skipped", "needs a GPU (`python -m experiments --dry-run` compiles the candidates)")
        child = Child([sys.executable, "-m", "experiments"], self.logs / "experiments.log")
        ended = child.wait(deadline)
        if ended:
            raise Outcome("failed", ended, child.tail())
        return "the table is in experiments.log"

    def _sanitizer(self, deadline: float) -> str | None:
        """compute-sanitizer's memcheck over a launch of every kernel on maps of a few pixels."""
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise Outcome("skipped", "compute-sanitizer is not installed")
        # PyTorch probes the driver with calls that fail. Without its cache of blocks the bounds are exact.
        prefix = [program, "--tool", "memcheck", "--report-api-errors", "no"]
        counts, output = self.suite("sanitize", deadline, prefix=prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summaries = _ERRORS.findall(output)
        said = f"{sum(map(int, summaries))} errors; launches: {counts}"
        if sum(map(int, summaries)):
            raise Outcome("failed", said, output)
        if not summaries and NO_TIME not in counts:
            raise Outcome("failed", f"memcheck gave no summary; launches: {counts}", output)
        return said


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0 minutes, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Build, test and measure the library on this machine's NVIDIA GPU, within a given time.",
        epilog="Exit status: 0 if every part had its turn and none failed, else 1; 2 for bad arguments or no GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prepare", action="store_true", help=f"compile into {prepare.FOLDER.relative_to(ROOT)}, without a GPU")
    add("--dry-run", action="store_true", help="run every part on the CPU; its figures mean nothing")
    add("--minutes", type=_minutes, metavar="M", help="end within M minutes (default: 8; 60 with --prepare)")
    add("--parts", metavar="NAMES", default="", help="only these parts, comma-separated; a wrong name lists them")
    add("-k", metavar="WORDS", default="", help="only rows whose name matches, as in pytest: -k 'neck and bf16'")
    add("--output", type=Path, default=LATEST, metavar="FILE", help=f"the JSON (default: {LATEST.name})")
    add("--keep", action="store_true", help="also write benchmarks/results/<gpu>-<date>.json")
    add("--logs", type=Path, metavar="FOLDER", help="the output of the children (default: a new temporary folder)")
    add("--commit", metavar="SHA", help="the commit of the sources, if they are no git clone")
    return parser


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    output, only = given.output.resolve(), tuple(filter(None, given.parts.split(",")))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        logs = (given.logs or Path(tempfile.mkdtemp(prefix="fpn_kernels-gpu-"))).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        parser.error(f"cannot write {error.filename or output}: {error.strerror}")
    signal.signal(signal.SIGTERM, _terminated)
    if given.prepare:
        return prepare.main(logs, 60 * (given.minutes or 60), small=given.dry_run)
    if given.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    seconds = 60 * (given.minutes or 8)
    run = Run(output, logs, seconds, dry_run=given.dry_run, only=only, words=given.k, commit=given.commit)
    if unknown := [name for name in only if name not in run.parts]:
        parser.error(f"--parts: {unknown[0]!r} is not a part; choose from {', '.join(run.parts)}")
    try:
        run.execute()
    except KeyboardInterrupt:
        run.save()
        print("interrupted: the report has the rows that were measured", flush=True)
    print(f"\n{report.to_text(records.Results.of(run.document))}\n")
    print(f"{run.document['seconds']:.0f} s; logs in {logs}; report: python -m benchmarks.report {output}")
    if run.no_gpu():
        return 2
    if given.keep and not given.dry_run:
        name = re.sub(r"[^a-z0-9]+", "-", run.document["environment"]["gpu"]["name"].lower()).strip("-")
        print(f"kept as {documents.keep(output, '-'.join([name, run.document['date'][:10]]))}")
    failed = any(part["status"] == "failed" or part.get("reason") == NO_TIME for part in run.document["parts"])
    return 1 if failed or not run.document["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
