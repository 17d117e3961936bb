"""The file of a run: its format, reading and writing.

    format, version    FORMAT and VERSION
    dry_run, note      whether its figures mean nothing; a remark for every table
    complete           false until the last part has ended
    date, seconds      when it began, how long it took
    environment        the machine and the versions (`machine.py`)
    parts, tests       of a GPU run: status, seconds and reason per part; counts and failures
    ceilings           limit, source, rate per second
    rows, candidates   per case and provider the status, and figures (`measure.py`) or the reason

Two older formats are read as well: pytest-benchmark's JSON, and version 1, whose parts are named steps.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import EAGER, LIBRARY
from benchmarks.targets import TARGETS, Target

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT, VERSION = "fpn_kernels benchmark run", 2
_READ = ((FORMAT, VERSION), ("fpn_kernels gpu run", 1))
LISTS = ("parts", "ceilings", "rows", "candidates")

Document = dict[str, Any]


class ReportError(Exception):
    """A file that cannot be reported on; the message is the reason, for the user."""


def empty(*, dry_run: bool = False, date: str = "") -> Document:
    """A run that has not begun."""
    head = {"format": FORMAT, "version": VERSION, "dry_run": dry_run, "note": "", "complete": False, "date": date}
    return {**head, "seconds": 0.0, "environment": {}, "tests": {}, **{name: [] for name in LISTS}}


def write(document: Document, path: Path) -> None:
    """In one move: a reader finds a whole document, however this process ends."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    temporary.replace(path)


@dataclass(frozen=True)
class Row:
    """A provider on a case, with figures.

    Attributes:
        times: clock ("host": until the call returns; "caller": until its result is there; "device": on the GPU itself)
            to `own` and `eager` (seconds), `ratio`, `spread` and `rounds`; eager's own row has neither eager nor ratio.
        served_by: the backends of the library's row.
    """

    operator: str
    direction: str
    case: str
    provider: str
    dtype: str
    layout: str
    batch: int
    level: int | None
    bytes: int
    flops: int
    times: Mapping[str, Mapping[str, float]]
    served_by: str
    method: str

    def median(self, clock: str) -> float:
        return self.times[clock]["own"]

    def ratio(self, clock: str) -> float | None:
        """Eager's time over this row's, the median over pairs of rounds."""
        return self.times[clock].get("ratio") if clock in self.times else None

    def range(self, clock: str) -> tuple[float, float]:
        """The middle half of the ratios, or of the times in eager's own row."""
        times = self.times[clock]
        middle = times.get("ratio", times["own"])
        return middle * (1 - times["spread"] / 2), middle * (1 + times["spread"] / 2)

    @property
    def clock(self) -> str:
        """The device's own where it was taken, else the caller's."""
        return "device" if "device" in self.times else "caller"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The same for this row in another run."""
        return self.operator, self.direction, self.case, self.provider


@dataclass(frozen=True)
class Results:
    """A run: its document, and its rows that have figures."""

    document: Document
    rows: list[Row]

    @classmethod
    def of(cls, document: Document) -> Results:
        return cls(document, [_row(entry) for entry in document["rows"] if entry["status"] == "ok"])

    @property
    def machine(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["environment"]
        return found

    @property
    def gpu(self) -> str | None:
        """The name of the GPU of the run."""
        return str(self.machine["gpu"]["name"]) if self.machine.get("gpu") else None

    def ceiling(self, limit: str) -> float | None:
        """The best rate that any measurement of this limit saw, per second."""
        return max((each["rate"] for each in self.document["ceilings"] if each["limit"] == limit), default=None)

    def floor(self, row: Row) -> float | None:
        """Seconds of the row's minimal bytes and operations at the measured ceilings."""
        bandwidth, rate = self.ceiling("bandwidth"), self.ceiling(f"flops {row.dtype.removeprefix('amp-')}")
        return max(row.bytes / bandwidth, row.flops / rate) if bandwidth and rate else None

    def rival(self, row: Row, provider: str) -> Row | None:
        """Another provider on the row's case."""
        return next((other for other in self.rows if other.key == (*row.key[:3], provider)), None)

    def against(self, row: Row, provider: str) -> float | None:
        """Another provider's time over the row's, by their ratios to eager: a change of the clock rate cancels."""
        rival = self.rival(row, provider)
        own, other = row.ratio(row.clock), rival.ratio(row.clock) if rival else None
        return own / other if own and other else None

    def target(self, row: Row) -> Target | None:
        """Of the library as a user gets it; on a GPU that has targets."""
        names = ("operator", "direction", "level", "batch", "dtype", "layout")
        found = (t for t in TARGETS.get(self.gpu or "", ()) if all(getattr(t, n) == getattr(row, n) for n in names))
        return next(found, None) if row.provider == LIBRARY else None


def ratio_to_eager(row: Row | None, eager: Row | None, clock: str) -> float | None:
    """The row's own ratio, else eager's time over the row's; None without either."""
    if row is None or row.ratio(clock):
        return row.ratio(clock) if row else None
    return eager.median(clock) / row.median(clock) if eager and row.provider != EAGER else None


def load(path: Path) -> Results:
    """Reads a run; `ReportError` if the file is missing, torn or of another kind."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON, or its run did not finish: {error}") from error
    try:
        if isinstance(document.get("benchmarks"), list):
            document = _from_pytest_benchmark(document)
        if (document.get("format"), document.get("version")) not in _READ:
            raise ReportError(f"{path} is not of the format {FORMAT!r}, version {VERSION}")
        document.setdefault("parts", document.get("steps", []))
        results = Results.of(document)
        found = [*results.rows, *(x for name in ("ceilings", "candidates", "parts") for x in document.get(name, ()))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ReportError(f"{path} is not the file of a run: {type(error).__name__}: {error}") from error
    if not found:
        raise ReportError(f"{path} holds no benchmark of this suite")
    return results


def _row(entry: Mapping[str, Any]) -> Row:
    served = (name for names in (entry.get("served_by") or {}).values() for name in names.split("+"))
    names = ("operator", "direction", "case", "provider", "dtype", "bytes", "flops")
    clocks = ["caller", *(clock for clock in ("host", "device") if clock in entry)]
    return Row(
        **{name: entry[name] for name in names},
        layout=entry.get("layout", ""),
        batch=entry.get("batch", 0),
        level=entry.get("level"),
        times={clock: {**entry[clock], "own": float(entry[clock]["own"])} for clock in clocks},
        served_by="+".join(dict.fromkeys(served)),
        method=entry.get("method", ""),
    )


def _from_pytest_benchmark(old: Mapping[str, Any]) -> Document:
    """A document of the runs before version 2, which hold every round."""
    machine = (old.get("machine_info") or {}).get("fpn_kernels") or {}
    renamed = {"version": "fpn_kernels", "device_name": "cpu", "capability": "cpu_capability"}
    document = empty(date=old.get("datetime") or "")
    document |= {"complete": True, "environment": {renamed.get(name, name): value for name, value in machine.items()}}
    for entry in old["benchmarks"]:
        info, times = entry.get("extra_info") or {}, (entry.get("stats") or {}).get("data")
        if times and "ceiling" in info:
            rate = info["amount"] / min(info.get("device_times") or times)
            document["ceilings"].append({"limit": info["ceiling"], "source": info["source"], "rate": rate})
        elif times and "provider" in info:
            row = {**info, "status": "ok", "caller": _summary(times, info.get("eager_times"))}
            if info.get("device_times"):
                row["device"] = _summary(info["device_times"], info.get("eager_device_times"))
            document["rows"].append(row)
    return document


def _summary(own: list[float], eager: list[float] | None) -> dict[str, float]:
    judged = [e / o for e, o in zip(eager, own, strict=False)] if eager else own
    middle = statistics.median(judged)
    first, _, third = statistics.quantiles(judged, n=4, method="inclusive") if len(judged) > 1 else [middle] * 3
    found = {"own": statistics.median(own), "spread": (third - first) / middle, "rounds": len(own)}
    return {**found, "eager": statistics.median(eager), "ratio": middle} if eager else found
