"""The comparison of a run as tables: one for each operator and direction, as text and as Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.records import EAGER, Results, Row, ratio_to_eager

# Above this share of a run in which the CPUs were short, its figures are not to be quoted.
_CONTENDED = 0.1


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
            ratio = ratio_to_eager(here.get(provider), here.get(EAGER), clock)
            if ratio:
                ratios[provider].append(ratio)
        cells = [_cell(here.get(provider), here.get(EAGER), floor, clock) for provider in rivals]
        served = here["fpn_kernels"].served_by if "fpn_kernels" in here else ""
        lines.append([case, format_seconds(floor), _eager_cell(here, floor, clock), *cells, served or "-"])
    notes = [_mean(provider, values) for provider, values in ratios.items() if values]
    return Table(title, ["case", "floor", EAGER, *rivals, "served by"], lines, notes)


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
    ratio = ratio_to_eager(row, eager, clock)
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


def as_text(table: Table) -> str:
    lines = [table.header, *table.lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, rule, rows[0], rule, *rows[1:], *(f"  {note}" for note in table.notes)])


def as_markdown(table: Table) -> str:
    grid = [table.header, ["---"] * len(table.header), *table.lines]
    body = "\n".join("| " + " | ".join(line) + " |" for line in grid)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"**{table.title}**\n\n{body}" + (f"\n\n{notes}" if notes else "")


def to_text(results: Results) -> str:
    blocks = ["\n".join(header(results)), *map(as_text, tables(results))]
    return "\n\n".join([*blocks, textwrap.fill(LEGEND, 110)] if results.rows else blocks)


def to_markdown(results: Results) -> str:
    blocks = ["\n".join(f"- {line}" for line in header(results)), *map(as_markdown, tables(results))]
    return "\n\n".join([*blocks, LEGEND] if results.rows else blocks)
