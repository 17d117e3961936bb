"""The comparison table of a run: `python -m benchmarks.report FILE.json [--markdown]`.

Reads what pytest-benchmark wrote. Needs neither torch nor the library, so that a file can be read anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EAGER = "eager"
# Above this share of a run in which the CPUs were short, its figures are not to be quoted.
_CONTENDED = 0.1
# A row whose middle half of rounds spreads over more than this fraction of its median is marked as unsteady.
_UNSTEADY = 0.2


class ReportError(Exception):
    """The file cannot be reported on; the message says why, for the user."""


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    Attributes:
        times: clock ("caller": until the result is there; "device": on the GPU itself) to the seconds of each round.
        eager_times: the same for the rounds of eager that alternated with them; empty in eager's own row.
        served_by: the backends behind the library's row.
    """

    operator: str
    direction: str
    case: str
    provider: str
    dtype: str
    bytes: int
    flops: int
    times: Mapping[str, Sequence[float]]
    eager_times: Mapping[str, Sequence[float]]
    served_by: str

    def median(self, clock: str) -> float:
        return statistics.median(self.times[clock])

    def ratios(self, clock: str) -> list[float]:
        """Eager's time over this row's, pair by pair."""
        return [eager / own for eager, own in zip(self.eager_times[clock], self.times[clock], strict=False)]

    def unsteady(self, clock: str) -> bool:
        """Whether what is shown of this row (the ratio; in eager's, the time) spreads too much to be trusted."""
        values = self.ratios(clock) or self.times[clock]
        if len(values) < 2:
            return False
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        return third - first > _UNSTEADY * statistics.median(values)


@dataclass
class Results:
    """A run: its rows in the order in which they ran, its ceilings, and the machine.

    `ceilings` maps what is limited ("bandwidth", "flops bf16") and by which measurement ("copy") to the best rate
    seen a second.
    """

    rows: list[Row] = field(default_factory=list)
    ceilings: dict[tuple[str, str], float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    def floor(self, row: Row) -> float | None:
        """Seconds that the row's minimal bytes and operations take at the measured ceilings."""
        bandwidth, rate = self.ceiling("bandwidth"), self.ceiling(f"flops {row.dtype}")
        if not bandwidth or not rate:
            return None
        return max(row.bytes / bandwidth, row.flops / rate)

    def ceiling(self, name: str) -> float | None:
        """The best rate that any measurement of this limit saw."""
        return max((rate for (limit, _), rate in self.ceilings.items() if limit == name), default=None)


def load(path: Path) -> Results:
    """Reads a file of pytest-benchmark's; `ReportError` where it is missing, empty or not from this suite."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise ReportError(f"{path} is empty: the run that should have written it did not finish")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    entries = document.get("benchmarks") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ReportError(f"{path} is not a file of pytest-benchmark's: it has no list of benchmarks")
    results = Results(
        machine=(document.get("machine_info") or {}).get("fpn_kernels") or {}, date=document.get("datetime") or ""
    )
    for entry in entries:
        _read(entry, results)
    if not results.rows and not results.ceilings:
        raise ReportError(f"{path} holds {len(entries)} benchmarks, none of them from this suite")
    return results


def _read(entry: Mapping[str, Any], results: Results) -> None:
    info, times = entry.get("extra_info") or {}, (entry.get("stats") or {}).get("data")
    if not times:
        return
    if "ceiling" in info:
        key = (info["ceiling"], info["source"])
        rate = info["amount"] / min(info.get("device_times") or times)
        results.ceilings[key] = max(rate, results.ceilings.get(key, 0.0))
    if "provider" not in info:
        return
    clocks = {"caller": ("eager_times", times)}
    if info.get("device_times"):
        clocks["device"] = ("eager_device_times", info["device_times"])
    served = (info.get("served_by") or {}).values()
    results.rows.append(
        Row(
            **{name: info[name] for name in ("operator", "direction", "case", "provider", "dtype", "bytes", "flops")},
            times={clock: own for clock, (_, own) in clocks.items()},
            eager_times={clock: info.get(eager) or [] for clock, (eager, _) in clocks.items()},
            served_by="+".join(dict.fromkeys(name for names in served for name in names.split("+"))),
        )
    )


def format_seconds(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "-"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


@dataclass
class Table:
    """A section of the report, ready to be laid out."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(results: Results) -> Iterator[Table]:
    """One table for each operator and direction, in the order in which they ran; on a GPU, one for each clock."""
    for operator, direction in dict.fromkeys((row.operator, row.direction) for row in results.rows):
        rows = [row for row in results.rows if (row.operator, row.direction) == (operator, direction)]
        title = f"{operator}, {direction}"
        if all("device" in row.times for row in rows):
            yield _table(f"{title} (time on the device)", rows, results, "device")
            title += " (time the caller waits)"
        yield _table(title, rows, results, "caller")


def _table(title: str, rows: Sequence[Row], results: Results, clock: str) -> Table:
    rivals = [provider for provider in dict.fromkeys(row.provider for row in rows) if provider != EAGER]
    rivals.sort(key=lambda provider: provider.startswith("fpn_kernels"))  # stable: rivals first, then the library
    lines = []
    ratios: dict[str, list[float]] = {provider: [] for provider in rivals}
    for case in dict.fromkeys(row.case for row in rows):
        here = {row.provider: row for row in rows if row.case == case}
        floor = results.floor(next(iter(here.values())))
        for provider in rivals:
            ratio = _ratio(here.get(provider), here.get(EAGER), clock)
            if ratio:
                ratios[provider].append(ratio)
        cells = [_cell(here.get(provider), here.get(EAGER), floor, clock) for provider in rivals]
        served = here["fpn_kernels"].served_by if "fpn_kernels" in here else ""
        lines.append([case, format_seconds(floor), _eager_cell(here, floor, clock), *cells, served or "-"])
    notes = [_mean(provider, values) for provider, values in ratios.items() if values]
    return Table(title, ["case", "floor", EAGER, *rivals, "served by"], lines, notes)


def _ratio(row: Row | None, eager: Row | None, clock: str) -> float | None:
    """The median over pairs; in a file without pairs, eager's median over the row's; None without either."""
    if row is None:
        return None
    if pairs := row.ratios(clock):
        return statistics.median(pairs)
    return eager.median(clock) / row.median(clock) if eager else None


def _eager_cell(here: Mapping[str, Row], floor: float | None, clock: str) -> str:
    """Eager's own row; where only others were run, the rounds of it that alternated with theirs."""
    if EAGER in here:
        return _cell(here[EAGER], None, floor, clock)
    times = [time for row in here.values() for time in row.eager_times[clock]]
    return " ".join(_time_and_share(statistics.median(times), floor)) if times else "-"


def _cell(row: Row | None, eager: Row | None, floor: float | None, clock: str) -> str:
    """Ratio to eager, time, share of the floor: `2.10x  1.24 ms  61%`."""
    if row is None:
        return "-"
    ratio = _ratio(row, eager, clock)
    parts = ([f"{ratio:.2f}x"] if ratio else []) + _time_and_share(row.median(clock), floor)
    return " ".join(parts) + (" ~" if row.unsteady(clock) else "")


def _time_and_share(seconds: float, floor: float | None) -> list[str]:
    return [format_seconds(seconds)] + ([f"{100 * floor / seconds:.0f}%"] if floor else [])


def _mean(provider: str, ratios: Sequence[float]) -> str:
    count = f"{len(ratios)} case" + ("s" if len(ratios) > 1 else "")
    return (
        f"{provider}: {statistics.geometric_mean(ratios):.2f}x eager"
        f" (geometric mean of {count}, {min(ratios):.2f}x to {max(ratios):.2f}x)"
    )


def header(results: Results) -> list[str]:
    """The machine and the versions, one fact or two a line."""
    info = results.machine
    if not info:
        return ["machine: not recorded in this file"]
    lines = [
        f"{info.get('device_name')} ({info.get('device')}, {info.get('capability')}),"
        f" {info.get('threads')} CPU threads",
        f"fpn_kernels {info.get('version')}, torch {info.get('torch')}, triton {info.get('triton') or 'not installed'};"
        f" backends here: {', '.join(info.get('backends', ()))}",
        f"{info.get('selection')} selection, {results.date[:16].replace('T', ' ')}; allocator: {info.get('allocator')}",
    ]
    contention = info.get("contention")
    if contention is not None and contention > _CONTENDED:
        lines.append(
            f"NOT QUIET: for {contention:.0%} of the run the CPUs were wanted by others as well;"
            " times and ratios are not this machine's"
        )
    if info.get("forced_backend"):
        lines.append(f"FPN_KERNELS_BACKEND={info['forced_backend']} forces the library's backend")
    if not results.ceilings:
        return [*lines, "no ceilings were measured in this run, hence no floors"]
    ceilings = [_ceiling(limit, source, rate) for (limit, source), rate in results.ceilings.items()]
    return [*lines, "ceilings measured: " + ", ".join(ceilings)]


def _ceiling(limit: str, source: str, rate: float) -> str:
    if limit == "bandwidth":
        return f"{source} {rate / 1e9:.0f} GB/s"
    return f"{limit.removeprefix('flops ')} {source} {rate / 1e9:.0f} GFLOP/s"


LEGEND = (
    "Each cell: eager's time over the provider's (above 1 is faster than eager), the provider's median time, and the"
    " floor as a share of that. The ratio is the median over rounds that alternate with eager's, so that on a busy"
    " machine it is the better figure. floor: the least time for the case's minimal bytes and operations at the"
    " measured ceilings (the best product of the dtype); a share above 100 % means that a cache served the data, or"
    " that the ceilings were measured in a worse moment. ~ : the middle half of the ratios (in eager's column, of the"
    " times) spreads over more than 20 %."
)


def to_text(results: Results) -> str:
    blocks = ["\n".join(header(results))]
    for table in tables(results):
        widths = [max(len(line[i]) for line in [table.header, *table.lines]) for i in range(len(table.header))]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [table.header, *table.lines]
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        blocks.append("\n".join([table.title, rule, rows[0], rule, *rows[1:], *(f"  {note}" for note in table.notes)]))
    if results.rows:
        blocks.append(textwrap.fill(LEGEND, 110))
    return "\n\n".join(blocks)


def to_markdown(results: Results) -> str:
    blocks = ["\n".join(f"- {line}" for line in header(results))]
    for table in tables(results):
        grid = [table.header, ["---"] * len(table.header), *table.lines]
        body = "\n".join("| " + " | ".join(line) + " |" for line in grid)
        notes = "\n".join(f"- {note}" for note in table.notes)
        blocks.append(f"**{table.title}**\n\n{body}" + (f"\n\n{notes}" if notes else ""))
    if results.rows:
        blocks.append(LEGEND)
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="print a run's comparison")
    parser.add_argument("file", type=Path, help="what a run wrote (by default to benchmarks/results/latest.json)")
    parser.add_argument("--markdown", action="store_true", help="as Markdown, to be pasted")
    options = parser.parse_args(arguments)
    try:
        results = load(options.file)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(to_markdown(results) if options.markdown else to_text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
