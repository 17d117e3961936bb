"""The tables and the figure of docs/benchmarks.md, made from the runs that it links: `python -m benchmarks.documents`.

Replaces, after each link to a file of benchmarks/results, the next table (of a GPU run: with the list before it).
`--figure` also draws the first CPU run into docs/benchmark-cpu.png; `--keep FILE NAME` first stores a run as
benchmarks/results/NAME.json. Needs neither torch nor the library.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import COMPILE, LIBRARY, MAX_AUTOTUNE
from benchmarks.records import RESULTS, ReportError, Results, Row, load, write
from benchmarks.report import format_ratio, format_seconds, header, markdown_grid

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
FIGURE = ROOT / "docs" / "benchmark-cpu.png"

_LINK = re.compile(r"\((?:\.\./)?benchmarks/results/([\w.-]+\.json)\)")
_TABLE = re.compile(r"(?:^- .*\n)*\n?(?:^\|.*\n)+", re.MULTILINE)
_GPU_HEADER = ["case", "time", "of the floor", "to eager", "to `torch.compile`", "to max-autotune", "caller", "target"]
_OPERATORS = ("neck", "top_down_pathway", "lateral_connection", "output_conv", "upsample_add", "weighted_merge")
_COLUMNS = ("fp32 NCHW", "fp32 NHWC", "bf16 NCHW", "bf16 NHWC")


def verdict(results: Results, row: Row) -> str:
    """ "met", or which parts of the target are not; "-" without a target."""
    target = results.target(row)
    if target is None:
        return "-"
    speed = None if target.seconds is None else target.seconds / row.median(row.clock)
    tuned = results.against(row, MAX_AUTOTUNE)
    figures = (("time", speed, speed and 1.0), ("eager", row.ratio(row.clock), target.eager))
    missed = [
        f"{name} not {'measured' if value is None else 'met'}"
        for name, value, least in (*figures, ("compile", tuned, target.compiled))
        if least is not None and (value is None or not value >= least)
    ]
    return "; ".join(missed) or "met"


def _gpu_table(results: Results) -> str:
    """The machine and how many targets are met, then a line per row that a user gets."""
    lines, aimed = [], [verdict(results, row) for row in results.rows if results.target(row)]
    for row in results.rows:
        if row.provider == LIBRARY and "device" in row.times:
            device, caller = row.times["device"], row.times["caller"]
            floor, target = results.floor(row), results.target(row)
            ratios = device["ratio"], results.against(row, COMPILE), results.against(row, MAX_AUTOTUNE)
            waits = f"{format_seconds(caller['own'])} (eager {format_seconds(caller['eager'])})"
            training = "" if row.direction == "forward" else " forward + backward"
            share = f"{100 * floor / device['own']:.0f}%" if floor else "-"
            aim = f"{target.text()}: {verdict(results, row)}" if target else "-"
            name = f"`{row.operator}`{training}, {row.case}"
            lines.append([name, format_seconds(device["own"]), share, *map(format_ratio, ratios), waits, aim])
    if results.document["dry_run"] or not lines:
        raise ReportError("no row of this run was measured on a GPU")
    met = f"{aimed.count('met')} of {len(aimed)} rows meet theirs" if aimed else f"none are set for {results.gpu}"
    said = "".join(f"- {line}\n" for line in (*header(results), f"targets: {met}"))
    return f"{said}\n{markdown_grid(_GPU_HEADER, lines)}"


def table(results: Results) -> str:
    """The table of a run; `ReportError` for a GPU run without a figure of its GPU."""
    return _gpu_table(results) if results.gpu or results.document["dry_run"] else _cpu_table(results)


def _cpu_table(results: Results) -> str:
    """Cases by dtype and layout: the ratio to eager and, in brackets, to torch.compile. Whole necks first."""
    cells: dict[str, dict[str, str]] = {}
    for row in sorted(results.rows, key=lambda row: (_OPERATORS.index(row.operator), len(row.direction))):
        ratio = row.ratio(row.clock)
        if row.provider == LIBRARY and ratio is not None:
            rival = results.against(row, COMPILE)
            line, column = _place(row)
            cells.setdefault(line, {})[column] = f"{ratio:.2f}x" + (f" ({rival:.2f}x)" if rival else "")
    columns = [column for column in _COLUMNS if any(column in line for line in cells.values())]
    return markdown_grid(["case", *columns], [[name, *(x.get(c, "") for c in columns)] for name, x in cells.items()])


def _place(row: Row) -> tuple[str, str]:
    """The line and the column of a row: "800x1280 C2 b1 bf16 NHWC" is in the last column."""
    *words, _, dtype, layout = row.case.split()
    size = next(index for index, word in enumerate(words) if re.fullmatch(r"\d+x\d+", word))
    image, spot = " ".join(words[: size + 1]).replace("x", " x "), words[size + 1 :]
    where = image if row.operator == "neck" else f"{' '.join(spot)} of {image}"
    name = "the whole neck" if row.operator == "neck" else f"`{row.operator}`"
    return f"{name}{'' if row.direction == 'forward' else ' forward + backward'}, {where}", f"{dtype} {layout}"


def linked(text: str) -> list[str]:
    """The names of the runs that a document links."""
    return _LINK.findall(text)


def updated(text: str, results: Path = RESULTS) -> str:
    """The document with the tables of the runs that it links."""
    parts, end = [], 0
    for link in _LINK.finditer(text):
        old = _TABLE.search(text, max(end, link.end()))
        if old is None:
            raise ReportError(f"no table follows the link to {link[1]}")
        blank = "\n" if old[0].startswith("\n") else ""
        parts += [text[end : old.start()], blank, table(load(results / link[1]))]
        end = old.end()
    return "".join([*parts, text[end:]])


def keep(file: Path, name: str) -> Path:
    """Stores a run in benchmarks/results."""
    kept = RESULTS / f"{name}.json"
    document = load(file).document
    if document["dry_run"]:
        raise ReportError(f"{file} is a dry run: its figures mean nothing")
    RESULTS.mkdir(exist_ok=True)
    write(document, kept)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", nargs=2, metavar=("FILE", "NAME"), help="first store a run in benchmarks/results")
    parser.add_argument("--figure", action="store_true", help="also draw the first CPU run")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="(default: docs/benchmarks.md)")
    given = parser.parse_args(arguments)
    try:
        if given.keep:
            print(f"kept as {keep(Path(given.keep[0]), given.keep[1])}")
        text = given.document.read_text()
        given.document.write_text(updated(text))
        print(f"{given.document}: {', '.join(linked(text)) or 'links no run'}")
        if given.figure:
            from benchmarks import figure

            runs = [load(RESULTS / name) for name in linked(text)]
            figure.draw(next(run for run in runs if run.gpu is None), FIGURE)
            print(f"drawn: {FIGURE}")
    except (ReportError, OSError, ImportError, StopIteration) as error:
        print(f"error: {error or 'the document links no CPU run'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
