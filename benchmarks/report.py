"""The report on a run: `python -m benchmarks.report FILE.json [--compare OLDER.json] [--fail-below RATIO]`.

Prints the comparison with eager, and writes it as Markdown and, with matplotlib, as a picture next to the file. Needs
neither torch nor the library.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import EAGER, LIBRARY
from benchmarks.records import ReportError, Results, Row, load, ratio_to_eager

TOO_SLOW = 3  # the exit status of the gate; 1 is an unreadable file, 2 a wrong option

# A run in which the CPUs were short for more than this share is not to be quoted.
_CONTENDED = 0.1
# Above this spread (`measure.summary`) a row is marked as unsteady.
_UNSTEADY = 0.2
LEGEND = (
    "Each cell: eager's time over the provider's (above 1 is faster than eager), the provider's median time, and the"
    " floor as a share of it. The ratio is the median over rounds that alternate with eager's, so on a busy machine it"
    " is the steadier figure. floor: the time of the case's minimal bytes and operations at the measured ceilings; a"
    " share above 100 % means that a cache served the data, or that the machine was slower during the ceilings. ~ : the"
    " middle half of the ratios (in eager's column, of the times) spreads over more than 20 %. On a GPU: time on the"
    " device by graph replay, inputs out of the cache (e: by events), and the time until the caller has the result."
)


def format_seconds(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "-"
    factor, unit = (1e6, "us") if seconds < 999.5e-6 else (1e3, "ms") if seconds < 0.9995 else (1.0, "s")
    value = seconds * factor
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def format_ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


@dataclass
class Table:
    """A section of the report."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(results: Results) -> Iterator[Table]:
    """One table per operator and direction; on a GPU, one per clock."""
    for operator, direction in dict.fromkeys(row.key[:2] for row in results.rows):
        rows = [row for row in results.rows if row.key[:2] == (operator, direction)]
        title = f"{operator}, {direction}"
        if all("device" in row.times for row in rows):
            yield _table(f"{title} (time on the device)", rows, results, "device")
            title += " (time the caller waits)"
        yield _table(title, rows, results, "caller")


def _table(title: str, rows: Sequence[Row], results: Results, clock: str) -> Table:
    providers = [provider for provider in dict.fromkeys(row.provider for row in rows) if provider != EAGER]
    providers.sort(key=lambda provider: provider.startswith(LIBRARY))  # stable: rivals first
    lines = []
    ratios: dict[str, list[float]] = {}
    for case in dict.fromkeys(row.case for row in rows):
        here = {row.provider: row for row in rows if row.case == case}
        eager, floor = here.get(EAGER), results.floor(next(iter(here.values())))
        for provider in providers:
            if ratio := ratio_to_eager(here.get(provider), eager, clock):
                ratios.setdefault(provider, []).append(ratio)
        # Eager's own row, or its rounds that alternated with those of others.
        times = [row.times[clock]["eager"] for row in here.values() if "eager" in row.times[clock]]
        others = " ".join(_time_and_share(statistics.median(times), floor)) if times else "-"
        cells = [_cell(eager, None, floor, clock) if eager else others]
        cells += [_cell(here.get(provider), eager, floor, clock) for provider in providers]
        served = here[LIBRARY].served_by if LIBRARY in here else ""
        lines.append([case, format_seconds(floor), *cells, served or "-"])
    notes = [f"{provider}: {_mean(values)} eager" for provider, values in ratios.items()]
    return Table(title, ["case", "floor", EAGER, *providers, "served by"], lines, notes)


def _mean(values: Sequence[float]) -> str:
    cases = f"{len(values)} case{'s' if len(values) > 1 else ''}"
    spread = f"{min(values):.2f}x to {max(values):.2f}x"
    return f"{statistics.geometric_mean(values):.2f}x (geometric mean of {cases}, {spread})"


def _cell(row: Row | None, eager: Row | None, floor: float | None, clock: str) -> str:
    """Ratio to eager, time, share of the floor: `2.10x 1.24 ms 61%`."""
    if row is None:
        return "-"
    ratio = ratio_to_eager(row, eager, clock)
    parts = ([format_ratio(ratio)] if ratio else []) + _time_and_share(row.median(clock), floor)
    parts += ["e"] if clock == "device" and row.method == "events" else []
    return " ".join(parts + (["~"] if row.times[clock]["spread"] > _UNSTEADY else []))


def _time_and_share(seconds: float, floor: float | None) -> list[str]:
    return [format_seconds(seconds)] + ([f"{100 * floor / seconds:.0f}%"] if floor else [])


def header(results: Results) -> list[str]:
    """The machine, the versions, the ceilings."""
    document, info, gpu = results.document, results.machine, results.machine.get("gpu")
    lines = [document["note"]] if document["note"] else []
    if document["dry_run"]:
        lines.append("DRY RUN on a CPU, maps of a few pixels: it shows that the parts work; no figure means anything")
    if not document["complete"]:
        lines.append("INCOMPLETE: the run ended before its last part")
    if gpu:
        smi = info.get("nvidia_smi") or {}
        driver = f", driver {smi['driver_version']}, power limit {smi['power.limit']}" if smi else ""
        size = f"{gpu['multiprocessors']} multiprocessors, {gpu['l2_bytes'] / 1e6:.0f} MB of L2"
        lines.append(f"{gpu['name']} ({gpu['capability']}, {size}){driver}")
    else:
        lines.append(f"{info.get('cpu')} ({info.get('cpu_capability')}), {info.get('threads')} CPU threads")
    versions = ("fpn_kernels", "torch", "triton", "cuda", "cudnn", "python", "commit")
    known = [f"{name} {info[name]}" for name in versions if info.get(name)]
    lines.append(", ".join([document["date"][:10], *known]))
    if info.get("allocator") and info.get("selection"):
        lines.append(f"{info['selection']} selection; allocator: {info['allocator']}")
    if (info.get("contention") or 0.0) > _CONTENDED:
        lines.append(f"NOT QUIET: for {info['contention']:.0%} of the run the CPUs were short; do not quote it")
    if info.get("forced_backend"):
        lines.append(f"FPN_KERNELS_BACKEND={info['forced_backend']} forces the library's backend")
    rates = []
    for limit in dict.fromkeys(entry["limit"] for entry in document["ceilings"]):
        rate, name = results.ceiling(limit) or 0.0, limit.removeprefix("flops ")
        giga = f"{rate / 1e9:.0f} G"
        large = f"{rate / 1e12:.3g} T" if rate >= 1e12 else giga
        rates.append(f"copy {giga}B/s" if limit == "bandwidth" else f"{name} {large}FLOP/s")
    return [*lines, "ceilings: " + (", ".join(rates) or "none measured, hence no floors")]


def summary(results: Results) -> list[str]:
    """The failures first, the candidates, then the outcome of each part."""
    document = results.document
    failures = document["tests"].get("failures", ())[:20]
    lines = [f"  {each['test']}: {each['message'].splitlines()[0][:160]}" for each in failures]
    names: dict[str, list[str]] = {}
    for entry in (*document["rows"], *document["candidates"]):
        name = " ".join(str(entry.get(name, "")) for name in ("operator", "direction", "case", "provider"))
        if entry["status"] != "ok":
            reason = " ".join(entry.get("reason", "").split())[:200]
            names.setdefault(f"{entry['status']}: {reason}", []).append(name)
        elif entry.get("kind") == "candidate":
            times = entry.get("device") or entry["caller"]
            lines.append(f"  candidate {name}: {format_seconds(times['own'])}, {times['ratio']:.2f}x what serves")
    lines += [f"  {n[0]}{f' and {len(n) - 1} more' if n[1:] else ''}: {reason}" for reason, n in names.items()]
    for part in document["parts"]:
        reason = f": {part['reason']}" if part.get("reason") else ""
        lines.append(f"{part['name']:<14} {part['status']:<8} {part['seconds']:6.1f} s{reason}")
    return lines


def as_text(table: Table) -> str:
    lines = [table.header, *table.lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, rule, rows[0], rule, *rows[1:], *(f"  {note}" for note in table.notes)])


def markdown_grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *lines))


def as_markdown(table: Table) -> str:
    notes = "".join(f"\n- {note}" for note in table.notes)
    return f"**{table.title}**\n\n{markdown_grid(table.header, table.lines)}{notes}".rstrip()


def _blocks(results: Results, layout: Callable[[Table], str], bullet: str) -> str:
    lists = ["\n".join(bullet + line for line in lines) for lines in (header(results), summary(results))]
    return "\n\n".join(filter(None, [*lists, *map(layout, tables(results)), LEGEND if results.rows else ""]))


def to_text(results: Results) -> str:
    text = _blocks(results, as_text, "")
    return text.replace(LEGEND, textwrap.fill(LEGEND, 110))


def to_markdown(results: Results) -> str:
    return _blocks(results, as_markdown, "- ")


# ---- two runs


@dataclass(frozen=True)
class Change:
    """A row in two runs.

    Attributes:
        factor: the new speed over the old. By the ratios to eager if both runs have them, so that the speed of the
            machine cancels; else by the times.
        distinct: the middle halves of the rounds of the two runs do not overlap.
    """

    now: Row
    before: Row
    factor: float
    distinct: bool


def changes(results: Results, other: Results) -> list[Change]:
    """The rows that both runs have, in the order of `results`."""
    earlier = {row.key: row for row in other.rows}
    found = []
    for now in results.rows:
        before, clock = earlier.get(now.key), now.clock
        if before is not None and before.clock == clock:
            new, old = _own_ratio(results, now), _own_ratio(other, before)
            factor = new / old if new and old else before.median(clock) / now.median(clock)
            (low, high), (low_before, high_before) = now.range(clock), before.range(clock)
            comparable = (now.ratio(clock) is None) == (before.ratio(clock) is None)
            found.append(Change(now, before, factor, comparable and (low > high_before or low_before > high)))
    return found


def _own_ratio(results: Results, row: Row) -> float | None:
    return ratio_to_eager(row, results.rival(row, EAGER), row.clock)


def change_tables(results: Results, other: Results) -> Iterator[Table]:
    """One table per operator and direction: before, now, and the factor between them."""
    found = changes(results, other)
    if not found:
        raise ReportError("the two files have no row in common")
    for operator, direction in dict.fromkeys(change.now.key[:2] for change in found):
        lines: list[list[str]] = []
        factors: dict[str, list[float]] = {}
        for change in (change for change in found if change.now.key[:2] == (operator, direction)):
            now, before, clock = change.now, change.before, change.now.clock
            factors.setdefault(now.provider, []).append(change.factor)
            cells = [_cell(x, run.rival(x, EAGER), None, clock) for x, run in ((before, other), (now, results))]
            word = ("faster" if change.factor > 1 else "slower") if change.distinct else ""
            if now.provider != EAGER:
                lines.append([now.case, now.provider, *cells, format_ratio(change.factor), word])
        notes = [f"{'the machine' if name == EAGER else name}: {_mean(values)}" for name, values in factors.items()]
        head = ["case", "provider", "before", "now", "change", ""]
        yield Table(f"{operator}, {direction}: change", head, lines, notes)


def differences(results: Results, other: Results) -> list[str]:
    """The other differences between the two runs, one per line."""
    names = ("gpu", "cpu", "cpu_capability", "threads", "fpn_kernels", "torch", "triton", "forced_backend", "allocator")
    pairs = [(name, results.machine.get(name), other.machine.get(name)) for name in names]
    lines = [f"{name}: {old or 'none'} before, {new or 'none'} now" for name, new, old in pairs if new != old]
    keys, earlier = ({row.key for row in run.rows} for run in (results, other))
    for count, which in ((len(earlier - keys), "before"), (len(keys - earlier), "now")):
        lines += [f"{count} row{'s' if count > 1 else ''} only in the run {which}"] if count else []
    return lines


def too_slow(results: Results, least: float, other: Results | None = None) -> list[str]:
    """The rows of the library below `least` times eager's speed (with `other`, their own speed there), worst first.

    Raises:
        ReportError: no row can be judged; a gate must not pass then.
    """
    if other is not None:
        judged = [(change.factor, change.now) for change in changes(results, other)]
    else:
        judged = [(ratio, row) for row in results.rows if (ratio := _own_ratio(results, row))]
    judged = [(value, row) for value, row in judged if row.provider == LIBRARY]
    if not judged:
        raise ReportError(f"no row of {LIBRARY} can be judged: none has a ratio")
    reference = "eager" if other is None else "its speed before"
    failed = sorted(((value, row) for value, row in judged if not value >= least), key=lambda pair: pair[0])
    return [f"{', '.join(row.key[:3])}: {value:.4g}x {reference}" for value, row in failed]


# ---- the command


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a ratio above 0, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Print a run and draw it.", allow_abbrev=False
    )
    add = parser.add_argument
    add("file", type=Path, help="the file of a run (by default benchmarks/results/latest.json)")
    add("--compare", type=Path, metavar="OLDER", help="show the change of each row since this run")
    gate = (
        f"exit with {TOO_SLOW} and name the rows of {LIBRARY} below RATIO times eager's speed or, with --compare, below"
    )
    add("--fail-below", type=_ratio, metavar="RATIO", help=f"{gate} RATIO times their own speed in OLDER")
    add("--markdown", action="store_true", help="print as Markdown")
    add("--no-files", action="store_true", help="print only: write no FILE.md and no FILE.png")
    options = parser.parse_args(arguments)
    try:
        results = load(options.file)
        other = None if options.compare is None else load(options.compare)
        text, markdown = to_text(results), to_markdown(results)
        if other is not None:
            changed, notes = list(change_tables(results, other)), differences(results, other)
            text = "\n\n".join([text, "\n".join([f"Change since {options.compare}", *notes]), *map(as_text, changed)])
            listed = "\n".join([f"Change since {options.compare.name}", "", *(f"- {note}" for note in notes)])
            markdown = "\n\n".join([markdown, listed.strip(), *map(as_markdown, changed)])
        failed = [] if options.fail_below is None else too_slow(results, options.fail_below, other)
        print(markdown if options.markdown else text)
        if not options.no_files:
            _write_files(options.file, results, markdown)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"too slow: {line} (expected at least {options.fail_below:g}x)", file=sys.stderr)
    return TOO_SLOW if failed else 0


def _write_files(file: Path, results: Results, markdown: str) -> None:
    """The Markdown and the picture next to the file; names them on stderr, so that a paste of stdout stays clean."""
    picture, page = file.with_suffix(".png"), file.with_suffix(".md")
    written = [str(page)]
    try:
        picture.unlink(missing_ok=True)  # of an earlier run
        if results.rows:
            try:
                from benchmarks import figure

                figure.draw(results, picture)
            except ImportError as error:
                print(f"no picture: {error}", file=sys.stderr)
            else:
                written.append(str(picture))
                markdown += f"\n\n![each case against eager, and the roofline]({picture.name})"
        page.write_text(markdown + "\n")
    except OSError as error:
        raise ReportError(
            f"cannot write to {file.parent}: {error.strerror or error} (--no-files only prints)"
        ) from error
    print(f"written: {', '.join(written)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
