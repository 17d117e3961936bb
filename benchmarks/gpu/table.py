"""A run as text, and as the Markdown of the README. Reads the document alone: no torch, no GPU."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cases import LIBRARY
from benchmarks.gpu.document import Document, Line, ceiling, clock_of, gpu_name, lines
from benchmarks.report import format_seconds

_LEGEND = (
    "time: of the device, by graph replay with inputs out of the cache ('e' where by events around single calls);"
    " floor: the least time for the case's bytes and operations at this run's ceilings, as a share of the time;"
    " x eager, x compile, x tuned: time of eager, torch.compile and torch.compile max-autotune over the library's;"
    " caller: until the result is there, launches included; memory: of eager's training step over the library's."
)

# A candidate that is faster by less than this is no reason to change a table.
_NOISE = 1.05


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _served(line: Line) -> str:
    backends = [name for names in line.entry.get("served_by", {}).values() for name in names.split("+")]
    return "+".join(dict.fromkeys(backends)) or "-"


def _memory(line: Line) -> str:
    peak = line.entry.get("peak_bytes")
    return f"{peak['eager'] / peak['own']:.2f}x" if peak and peak["own"] else "-"


def _name(line: Line) -> str:
    entry = line.entry
    training = "" if entry["direction"] == "forward" else " +backward"
    backend = entry["provider"].removeprefix(LIBRARY)
    return f"{entry['operator']}{training} {entry['case']}" + (f" {backend}" if backend else "")


_HEADER = ["row", "time", "floor", "eager", "x eager", "x compile", "x tuned", "caller", "memory"]
_HEADER += ["served by", "target", "met"]


def _cells(line: Line) -> list[str]:
    time = format_seconds(line.seconds) + (" e" if line.entry.get("method") == "events" else "")
    return [
        _name(line),
        time,
        _percent(line.share),
        format_seconds(line.eager_seconds),
        _ratio(line.eager),
        _ratio(line.compiled),
        _ratio(line.tuned),
        format_seconds(line.caller),
        _memory(line),
        _served(line),
        line.target.text() if line.target else "-",
        line.verdict(),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    grid = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(row) + " |" for row in grid]


def header(document: Document) -> list[str]:
    """The machine, the versions, the ceilings."""
    environment, gpu = document["environment"], document["environment"].get("gpu")
    said = [document["note"]] if document["note"] else []
    if document["dry_run"]:
        said.append(
            "DRY RUN on a CPU, maps of a few pixels: it shows that the steps work, and no figure means anything"
        )
    if not document["complete"]:
        said.append("INCOMPLETE: the run was ended before its last step")
    machine = "no GPU"
    if gpu:
        machine = f"{gpu['name']} ({gpu['capability']}, {gpu['multiprocessors']} multiprocessors,"
        machine += f" {gpu['l2_bytes'] / 1e6:.0f} MB of L2)"
    smi = environment.get("nvidia_smi") or {}
    driver = [f"driver {smi['driver_version']}", f"power limit {smi['power.limit']}"] if smi else []
    said.append(", ".join([machine, *driver]))
    versions = ("fpn_kernels", "torch", "triton", "cuda", "cudnn", "python", "commit")
    known = [f"{name} {environment[name]}" for name in versions if environment.get(name)]
    said.append(", ".join([document["date"][:10], *known]))
    rates = []
    for limit in dict.fromkeys(entry["limit"] for entry in document["ceilings"]):
        rate = ceiling(document, limit) or 0.0
        rates.append(
            f"copy {rate / 1e9:.0f} GB/s" if limit == "bandwidth" else f"{limit[6:]} {rate / 1e12:.3g} TFLOP/s"
        )
    said.append("ceilings: " + (", ".join(rates) or "none measured, hence no floors"))
    return said


def _unit_counts(entries: Sequence[dict[str, str]]) -> str:
    counts = Counter(entry["status"] for entry in entries)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"


def verdicts(document: Document) -> str:
    """How many of the targets are met, in a line."""
    aimed = [line for line in lines(document) if line.target]
    if not aimed:
        name = gpu_name(document)
        return f"targets: none are set for {name}" if name else "targets: none without a GPU"
    met = sum(line.verdict() == "met" for line in aimed)
    return f"targets: {met} of {len(aimed)} rows meet theirs"


def summary(document: Document) -> list[str]:
    """What each step came to, and everything that failed, by name."""
    said = []
    for step in document["steps"]:
        reason = f": {step['reason']}" if step.get("reason") else ""
        said.append(f"{step['name']:<14} {step['status']:<8} {step['seconds']:6.1f} s{reason}")
    if document["smoke"]:
        said.append(f"smoke against float64: {_unit_counts(document['smoke'])}")
        said += _by_reason([(unit["id"], unit) for unit in document["smoke"] if unit["status"] == "failed"])
    tests = document["tests"]
    if tests:
        said.append(
            f"gpu tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped,"
            f" {tests['crashed']} crashed, {tests['not_run']} of {tests['collected']} not run"
        )
        said += [
            f"  {failure['test']}: {failure['message'].splitlines()[0][:160]}" for failure in tests["failures"][:20]
        ]
    said += [f"{tool['tool']}: {tool['status']}, {tool.get('reason', '')}" for tool in document["sanitizer"]]
    if document["candidates"]:
        better = list(_better_candidates(document["candidates"]))
        counts = _unit_counts(document["candidates"])
        said.append(f"candidates: {counts}; {len(better)} classes of calls for which the library's choice is slower")
        said += better[:40]
        failed = [(entry["id"], entry) for entry in document["candidates"] if entry["status"] == "failed"]
        said += _by_reason(failed)
    rows = [(f"{row['operator']} {row['direction']} {row['case']} {row['provider']}", row) for row in document["rows"]]
    said.append(f"rows: {_unit_counts(document['rows'])}")
    said += _by_reason([(name, row) for name, row in rows if row["status"] != "ok"])
    return said


def _better_candidates(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each class of calls for which the library's choice is not the fastest candidate."""
    for each in (each for entry in entries for each in entry.get("measured", ())):
        times, call = each["microseconds"], f"{each['call']}: {each['default']}"
        if not times:
            yield f"  {call}: no candidate runs"
            continue
        best = min(times, key=times.__getitem__)
        own = times.get(each["default"])
        if own is None:
            yield f"  {call} does not run, {best} takes {times[best]:.1f} us"
        elif own > _NOISE * times[best]:
            yield f"  {call} takes {own:.1f} us, {best} {times[best]:.1f} us ({own / times[best]:.2f}x)"


def _by_reason(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One line a reason, with the first that it is true of."""
    said: dict[str, list[str]] = {}
    for name, entry in entries:
        said.setdefault(f"{entry['status']}: {' '.join(entry['reason'].split())[:200]}", []).append(name)
    more = [f" and {len(names) - 1} more" if names[1:] else "" for names in said.values()]
    return [f"  {names[0]}{rest}: {why}" for (why, names), rest in zip(said.items(), more, strict=True)]


def to_text(document: Document, *, headline: bool = False) -> str:
    """The machine, the steps, and the measured rows: all of them, or the headline and what has a target."""
    blocks = ["\n".join(header(document)), "\n".join(summary(document))]
    found = [line for line in lines(document) if not line.reason]
    if headline:
        found = [line for line in found if line.target or _is_headline(line)]
    if found:
        title = "time on the device" if clock_of(document) == "device" else "time of the caller (no GPU)"
        blocks.append("\n".join([title, *_aligned([_HEADER, *map(_cells, found)])]))
        blocks.append(verdicts(document))
        blocks.append(textwrap.fill(_LEGEND, 110))
    return "\n\n".join(blocks)


def _is_headline(line: Line) -> bool:
    return (line.entry["dtype"], line.entry["layout"]) == ("bf16", "NHWC")


_README_HEADER = [
    "case",
    "time",
    "of the floor",
    "to eager",
    "to `torch.compile`",
    "to max-autotune",
    "caller",
    "target",
]


def _readme_cells(line: Line) -> list[str]:
    entry = line.entry
    training = "" if entry["direction"] == "forward" else " forward + backward"
    met = line.verdict()
    target = "-" if line.target is None else f"{line.target.text()}: {met}"
    return [
        f"`{entry['operator']}`{training}, {entry['case']}",
        format_seconds(line.seconds),
        _percent(line.share),
        _ratio(line.eager),
        _ratio(line.compiled),
        _ratio(line.tuned),
        f"{format_seconds(line.caller)} (eager {format_seconds(line.eager_caller)})",
        target,
    ]


def to_readme(document: Document) -> str:
    """The README's table: the library as it serves a user, what was measured and nothing else.

    Raises:
        ValueError: the file holds no figure of a GPU.
    """
    if document["dry_run"] or gpu_name(document) is None:
        raise ValueError("a run without a GPU has no figure for the README")
    measured = [line for line in lines(document) if not line.reason and line.entry["provider"] == LIBRARY]
    measured = [line for line in measured if line.entry.get("device")]
    if not measured:
        raise ValueError("no row was measured on the device")
    said = "\n".join(f"- {line}" for line in header(document))
    grid = "\n".join(_markdown([_README_HEADER, *map(_readme_cells, measured)]))
    return f"{said}\n- {verdicts(document)}\n\n{grid}\n"
