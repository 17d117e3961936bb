"""The JSON of a run: its form, and what follows from its figures. Needs neither torch nor the library.

format, version     FORMAT and VERSION
dry_run, note       whether it was a walk through the steps on a CPU; a remark that every table repeats
complete            false until the last step has ended
date, seconds, limit_seconds
environment         what `environment.py` collects
steps               one entry a step: name, status, seconds, budget, and reason, output where there is something
smoke, sanitizer    one entry a unit, or a tool: status, and figures or the reason
candidates          one entry a case: status, and the time of each candidate kernel or the reason
tests               counts, and the tests that failed
ceilings            limit, source, rate a second
rows                one entry a case and provider: status, and figures (`measure.py`) or the reason
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import COMPILE, LIBRARY, MAX_AUTOTUNE
from benchmarks.gpu.targets import TARGETS, Target

FORMAT = "fpn_kernels gpu run"
VERSION = 1

Document = dict[str, Any]

_FORM: dict[str, type | tuple[type, ...]] = {
    "dry_run": bool,
    "note": str,
    "complete": bool,
    "date": str,
    "seconds": (int, float),
    "limit_seconds": (int, float),
    "environment": dict,
    "steps": list,
    "smoke": list,
    "sanitizer": list,
    "candidates": list,
    "tests": dict,
    "ceilings": list,
    "rows": list,
}
_FORM_OF_ENTRIES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "steps": {"name": str, "status": str, "seconds": (int, float)},
    "smoke": {"id": str, "status": str},
    "sanitizer": {"tool": str, "status": str},
    "candidates": {"id": str, "status": str},
    "ceilings": {"limit": str, "source": str, "rate": (int, float)},
    "rows": {
        **dict.fromkeys(("operator", "direction", "case", "dtype", "layout", "provider", "status"), str),
        "batch": int,
        "level": (int, type(None)),
    },
}
_FORM_OF_MEASURED = {"bytes": int, "flops": int, "served_by": dict, "caller": dict, "host": dict}


class DocumentError(Exception):
    """The file is not what a run writes; the message says why, for the user."""


def empty(*, dry_run: bool, date: str, limit_seconds: float) -> Document:
    """A run that has not begun."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dry_run": dry_run,
        "note": "",
        "complete": False,
        "date": date,
        "seconds": 0.0,
        "limit_seconds": limit_seconds,
        "environment": {},
        "steps": [],
        "smoke": [],
        "sanitizer": [],
        "candidates": [],
        "tests": {},
        "ceilings": [],
        "rows": [],
    }


def write(document: Document, path: Path) -> None:
    """In one move: whoever reads the file finds a whole document, however this process ends."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def load(path: Path) -> Document:
    """Reads and checks a run's file; `DocumentError` where it is not one."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DocumentError(f"{path} is not JSON: {error}") from error
    for problem in problems(document):
        raise DocumentError(f"{path}: {problem}")
    return document  # type: ignore[no-any-return]


def problems(document: Any) -> Iterator[str]:
    """What keeps this from being a run's document."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        yield f"not a document of the format {FORMAT!r}"
        return
    if document.get("version") != VERSION:
        yield f"version {document.get('version')!r}, where this reads {VERSION}"
        return
    yield from _misfits(document, _FORM, "the document")
    for name, form in _FORM_OF_ENTRIES.items():
        entries = document.get(name)
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            where = f"{name}[{index}]"
            if not isinstance(entry, dict):
                yield f"{where} is no object"
                continue
            yield from _misfits(entry, form, where)
            if name == "rows" and entry.get("status") == "ok":
                yield from _misfits(entry, _FORM_OF_MEASURED, where)


def _misfits(entry: Mapping[str, Any], form: Mapping[str, type | tuple[type, ...]], where: str) -> Iterator[str]:
    for name, kind in form.items():
        if name not in entry:
            yield f"{where} lacks {name!r}"
        elif not isinstance(entry[name], kind):
            yield f"{where}: {name!r} is {type(entry[name]).__name__}"


@dataclass(frozen=True)
class Line:
    """One of the library's providers on one case, beside its rivals.

    Ratios are of times on the device (of the caller's where there is no other), above 1 where the library is faster.
    That to a rival compares what each is to the eager rounds that took turns with it, so that a change of the GPU's
    clock rates between the two drops out.

    Attributes:
        entry: the row in the document.
        reason: why it has no figures, or "".
        seconds, eager_seconds, caller, host, peak_bytes: medians of the library's and of eager's time.
        floor: seconds that the minimal bytes and operations take at the measured ceilings.
        eager, compiled, tuned: ratios to eager, torch.compile and torch.compile max-autotune.
        reasons: provider to the reason why its ratio is missing.
    """

    entry: Mapping[str, Any]
    reason: str
    seconds: float | None
    eager_seconds: float | None
    caller: float | None
    eager_caller: float | None
    floor: float | None
    eager: float | None
    compiled: float | None
    tuned: float | None
    reasons: Mapping[str, str]
    target: Target | None

    @property
    def share(self) -> float | None:
        """The floor as a fraction of the time."""
        return self.floor / self.seconds if self.floor and self.seconds else None

    def verdict(self) -> str:
        """ "met", or which parts are not; "-" without a target."""
        if self.target is None:
            return "-"
        if self.reason:
            return "not measured"
        parts = [_verdict("time", self.seconds, self.target.seconds, most=True)]
        parts.append(_verdict("eager", self.eager, self.target.eager))
        parts.append(_verdict("compile", self.tuned, self.target.compiled))
        return "; ".join(filter(None, parts)) or "met"


def _verdict(name: str, value: float | None, wanted: float | None, *, most: bool = False) -> str:
    """ "" where the target is met or there is none."""
    if wanted is None:
        return ""
    if value is None:
        return f"{name} not measured"
    met = value <= wanted if most else value >= wanted
    return "" if met else f"{name} not met"


def gpu_name(document: Document) -> str | None:
    gpu = document["environment"].get("gpu")
    return str(gpu["name"]) if gpu else None


def clock_of(document: Document) -> str:
    """What the rows are compared by: the device's own clock where any row has one."""
    return "device" if any("device" in row for row in document["rows"]) else "caller"


def ceiling(document: Document, limit: str) -> float | None:
    """The best rate that any measurement of this limit saw."""
    return max((entry["rate"] for entry in document["ceilings"] if entry["limit"] == limit), default=None)


def lines(document: Document) -> Iterator[Line]:
    """The library's rows, in the order in which they were measured, cases together."""
    of_case: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in document["rows"]:
        key = (row["operator"], row["direction"], row["case"])
        of_case.setdefault(key, {})[row["provider"]] = row
    name, clock = gpu_name(document), clock_of(document)
    for here in of_case.values():
        for provider, row in here.items():
            if provider == LIBRARY or provider.startswith(f"{LIBRARY}/"):
                yield _line(row, here, document, name, clock)


def _line(
    row: Mapping[str, Any], here: Mapping[str, Mapping[str, Any]], document: Document, name: str | None, clock: str
) -> Line:
    times, caller = row.get(clock), row.get("caller")
    ratios = {rival: _against(row, here.get(rival), clock) for rival in (COMPILE, MAX_AUTOTUNE)}
    return Line(
        entry=row,
        reason="" if times else f"{row['status']}: {row.get('reason', '')}",
        seconds=times["own"] if times else None,
        eager_seconds=times["eager"] if times else None,
        caller=caller["own"] if caller else None,
        eager_caller=caller["eager"] if caller else None,
        floor=_floor(row, document) if times else None,
        eager=times["ratio"] if times else None,
        compiled=ratios[COMPILE],
        tuned=ratios[MAX_AUTOTUNE],
        reasons={rival: here[rival].get("reason", "") for rival in ratios if rival in here and ratios[rival] is None},
        target=_target(row, name) if row["provider"] == LIBRARY else None,
    )


def _against(row: Mapping[str, Any], rival: Mapping[str, Any] | None, clock: str) -> float | None:
    if rival is None or clock not in rival or clock not in row:
        return None
    return float(row[clock]["ratio"] / rival[clock]["ratio"])


def _floor(row: Mapping[str, Any], document: Document) -> float | None:
    bandwidth, rate = ceiling(document, "bandwidth"), ceiling(document, f"flops {row['dtype']}")
    if not bandwidth or not rate:
        return None
    return max(float(row["bytes"]) / bandwidth, float(row["flops"]) / rate)


def _target(row: Mapping[str, Any], name: str | None) -> Target | None:
    names = ("operator", "direction", "level", "batch", "dtype", "layout")
    wanted = tuple(row[field] for field in names)
    for target in TARGETS.get(name or "", ()):
        if tuple(getattr(target, field) for field in names) == wanted:
            return target
    return None
