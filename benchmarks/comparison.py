"""Two runs row by row, and the gate: which of the library's rows are slower than they may be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.records import EAGER, ReportError, Results, Row, middle_half, ratio_to_eager
from benchmarks.tables import Table, format_seconds

LIBRARY = "fpn_kernels"  # as it is used, free to choose a backend; a forced one may rightly be slower


@dataclass(frozen=True)
class Change:
    """One row in two runs.

    Attributes:
        factor: how many times as fast as before.  By the ratios to eager where both runs have them, so that a
            machine that was slower as a whole does not count; else by the times.
        told_apart: the middle halves of the rounds of the two runs do not overlap.
    """

    now: Row
    before: Row
    factor: float
    told_apart: bool


def _eager_of(results: Results, row: Row) -> Row | None:
    key = (*row.key[:3], EAGER)
    return next((other for other in results.rows if other.key == key), None)


def _ratio(results: Results, row: Row) -> float | None:
    return None if row.provider == EAGER else ratio_to_eager(row, _eager_of(results, row), row.clock)


def changes(results: Results, other: Results) -> list[Change]:
    """The rows that both runs have, in the order of `results`."""
    earlier = {row.key: row for row in other.rows}
    found = []
    for now in results.rows:
        before = earlier.get(now.key)
        if before is None or before.clock != now.clock:
            continue
        clock = now.clock
        ratios = _ratio(results, now), _ratio(other, before)
        by_time = before.median(clock) / now.median(clock)
        factor = ratios[0] / ratios[1] if ratios[0] and ratios[1] else by_time
        halves = [middle_half(row.ratios(clock) or row.times[clock]) for row in (now, before)]
        comparable = bool(now.ratios(clock)) == bool(before.ratios(clock))
        apart = halves[0][0] > halves[1][1] or halves[1][0] > halves[0][1]
        found.append(Change(now, before, factor, comparable and apart))
    return found


def tables(results: Results, other: Results) -> Iterator[Table]:
    """One table for each operator and direction: before, now, and the factor between them."""
    found = changes(results, other)
    if not found:
        raise ReportError("the two files have no row in common")
    for operator, direction in dict.fromkeys(change.now.key[:2] for change in found):
        here = [change for change in found if change.now.key[:2] == (operator, direction)]
        lines = [
            [
                change.now.case,
                change.now.provider,
                _cell(other, change.before),
                _cell(results, change.now),
                f"{change.factor:.2f}x",
                ("faster" if change.factor > 1 else "slower") if change.told_apart else "",
            ]
            for change in here
            if change.now.provider != EAGER
        ]
        header = ["case", "provider", "before", "now", "change", ""]
        yield Table(f"{operator}, {direction}: change", header, lines, _means(here))


def _means(here: Sequence[Change]) -> list[str]:
    notes = []
    for provider in dict.fromkeys(change.now.provider for change in here):
        factors = [change.factor for change in here if change.now.provider == provider]
        mean, spread = statistics.geometric_mean(factors), f"{min(factors):.2f}x to {max(factors):.2f}x"
        whose = "the machine's own change" if provider == EAGER else f"{provider}'s"
        notes.append(f"{whose}: {mean:.2f}x (geometric mean of {len(factors)}, {spread})")
    return notes


def _cell(results: Results, row: Row) -> str:
    ratio = _ratio(results, row)
    cell = (f"{ratio:.2f}x " if ratio else "") + format_seconds(row.median(row.clock))
    return cell + (" ~" if row.unsteady(row.clock) else "")


def differences(results: Results, other: Results) -> list[str]:
    """What else is not the same in the two runs, one fact a line."""
    lines = []
    for name in ("device_name", "capability", "threads", "version", "torch", "triton", "forced_backend", "allocator"):
        now, before = results.machine.get(name), other.machine.get(name)
        if now != before:
            lines.append(f"{name}: {before or 'none'} before, {now or 'none'} now")
    keys, earlier = ({row.key for row in run.rows} for run in (results, other))
    for count, which in ((len(earlier - keys), "before"), (len(keys - earlier), "now")):
        if count:
            lines.append(f"{count} row{'s' if count > 1 else ''} only in the run {which}")
    return lines


def too_slow(results: Results, least: float, other: Results | None = None) -> list[str]:
    """The rows of the library that fall below `least`, one a line, the worst first.

    Against eager in the same run, or, where there is another run, against the row's own speed there.

    Raises:
        ReportError: no row can be judged: a gate that judges nothing must not pass.
    """
    judged: list[tuple[float, Row]] = []
    if other is not None:
        judged = [(change.factor, change.now) for change in changes(results, other) if change.now.provider == LIBRARY]
    else:
        for row in results.rows:
            ratio = _ratio(results, row) if row.provider == LIBRARY else None
            if ratio is not None:
                judged.append((ratio, row))
    if not judged:
        raise ReportError(f"no row of {LIBRARY} can be judged: none has a ratio")
    reference = "eager" if other is None else "its speed before"
    failed = sorted(((value, row) for value, row in judged if not value >= least), key=lambda pair: pair[0])
    return [
        f"{row.operator}, {row.direction}, {row.case}: {_below(value, least)}x {reference}"
        + (" ~" if row.unsteady(row.clock) else "")
        for value, row in failed
    ]


def _below(value: float, least: float) -> str:
    """With as many decimals as it takes to look smaller than `least`."""
    decimals = 2
    while decimals < 6 and round(value, decimals) >= least and not math.isnan(value):
        decimals += 1
    return f"{value:.{decimals}f}"
