"""The report on a run: `python -m benchmarks.report FILE.json [--compare OLDER.json] [--fail-below RATIO]`.

Prints the comparison with eager, and writes it as Markdown and as a picture (where matplotlib is installed) beside
the file.  Needs neither torch nor the library, so that a file can be read anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import comparison
from benchmarks.records import EAGER, ReportError, Results, Row, load
from benchmarks.tables import Table, as_markdown, as_text, format_seconds, header, tables, to_markdown, to_text

__all__ = [
    "EAGER",
    "ReportError",
    "Results",
    "Row",
    "Table",
    "format_seconds",
    "header",
    "load",
    "main",
    "tables",
    "to_markdown",
    "to_text",
]

TOO_SLOW = 3  # the exit status of the gate, told apart from 1 (the file cannot be read) and 2 (a wrong option)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a ratio above 0, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="print a run's comparison and draw it", allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="what a run wrote (by default to benchmarks/results/latest.json)")
    parser.add_argument("--compare", type=Path, metavar="OLDER", help="show the change of each row since this run")
    parser.add_argument(
        "--fail-below",
        type=_ratio,
        metavar="RATIO",
        help=f"exit with {TOO_SLOW} and name the rows of fpn_kernels that are below RATIO times eager's speed or, with"
        " --compare, below RATIO times their own speed in OLDER",
    )
    parser.add_argument("--markdown", action="store_true", help="print as Markdown, to be pasted")
    parser.add_argument("--no-files", action="store_true", help="print only: write no FILE.md and no FILE.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        results = load(options.file)
        other = None if options.compare is None else load(options.compare)
        text, markdown = to_text(results), to_markdown(results)
        if other is not None:
            changes = list(comparison.tables(results, other))
            notes = comparison.differences(results, other)
            text = "\n\n".join([text, "\n".join([f"Change since {options.compare}", *notes]), *map(as_text, changes)])
            listed = "\n".join([f"Change since {options.compare.name}", "", *(f"- {note}" for note in notes)])
            markdown = "\n\n".join([markdown, listed.strip(), *map(as_markdown, changes)])
        failed = [] if options.fail_below is None else comparison.too_slow(results, options.fail_below, other)
        print(markdown if options.markdown else text)
        if not options.no_files:
            _write_files(options.file, results, markdown)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"too slow: {line} (wanted: {options.fail_below:g}x)", file=sys.stderr)
    return TOO_SLOW if failed else 0


def _write_files(file: Path, results: Results, markdown: str) -> None:
    """The Markdown and the picture beside the file; says on stderr what was written, so that a paste stays clean."""
    picture, page = file.with_suffix(".png"), file.with_suffix(".md")
    written = [str(page)]
    try:
        # A picture of an earlier run must not stand beside this one's figures.
        picture.unlink(missing_ok=True)
        if results.rows:
            try:
                from benchmarks import figure

                figure.draw(results, picture)
            except ImportError as error:
                print(f"no picture: {error}", file=sys.stderr)
            else:
                written.append(str(picture))
                markdown += f"\n\n![each case beside eager, and the roofline]({picture.name})"
        page.write_text(markdown + "\n")
    except OSError as error:
        raise ReportError(f"cannot write beside {file}: {error.strerror or error} (--no-files prints only)") from error
    print(f"written: {', '.join(written)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
