"""`python -m benchmarks`: runs the suite, writes its results as JSON, prints fused against eager.

Everything after `--` goes to pytest, whose output is then printed, e.g. `-- --benchmark-verbose`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, records, report
from benchmarks.options import add_options, to_arguments
from benchmarks.runner import ROOT, Items
from benchmarks.session import Outcome, Session

LATEST = records.RESULTS / "latest.json"
# For the rounds of one clock of a row.
_SECONDS = {"full": 1.0, "quick": 0.4, "candidates": 0.4, "tiny": 0.001}
_DAY = 86400.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the library against eager PyTorch and torch.compile on this machine.",
        epilog="Arguments after -- go to pytest. The default selection takes about three minutes on two CPU cores.",
        allow_abbrev=False,
    )
    add, select = parser.add_argument, parser.add_mutually_exclusive_group()
    select.add_argument("--full", action="store_true", help="every shape, level, mode and provider (an hour on a CPU)")
    select.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests of the suite
    select.add_argument(
        "--candidates", metavar="MODULE", help="time its list CANDIDATES against what the library serves"
    )
    add_options(add)
    add("-k", metavar="WORDS", help="only rows whose name matches, as in pytest: -k 'neck and bf16'")
    add("--list", action="store_true", help="print the names of the rows, measure nothing")
    add("--output", type=Path, default=LATEST, metavar="FILE", help=f"the JSON (default: {LATEST.relative_to(ROOT)})")
    add("--markdown", action="store_true", help="print the comparison as Markdown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, given = _parser(), list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options, passed_on = parser.parse_args(given[:cut]), given[cut + 1 :]
    select = "full" if options.full else "tiny" if options.tiny else "candidates" if options.candidates else "quick"
    wanted = [f"--seconds={_SECONDS[select]}", *to_arguments(options), *(["-k", options.k] if options.k else [])]
    wanted += [f"--candidates={options.candidates}"] if options.candidates else []
    with tempfile.TemporaryDirectory(prefix="fpn_kernels-bench-") as folder:
        session = Session(options.output.resolve(), Path(folder), options.device, *wanted, *passed_on)
        if options.list:
            command = [str(ROOT / "benchmarks"), f"--select={select}", *session.options]
            items = Items(command, Path(folder), "list", lambda name, unit, _: print(unit["id"]), collect_only=True)
            return 0 if items.run(time.monotonic() + _DAY) is None else _nothing(items.output)
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            session.save()  # a run that dies must not be reported with the figures of the last one
        except OSError as error:
            parser.error(f"--output: cannot write {options.output}: {error.strerror}")
        return _measure(session, select, show_output=bool(passed_on), markdown=options.markdown)


def _nothing(output: str) -> int:
    """Prints why no item was collected: an option is wrong, or no row matches."""
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    print("\n".join(errors) or "error: no row matches; `python -m benchmarks --list` names them", file=sys.stderr)
    return 4 if errors else 5


def _measure(session: Session, select: str, *, show_output: bool, markdown: bool) -> int:
    began, stalled, status = time.monotonic(), machine.stalled_seconds(), 0
    document = session.document
    try:
        session.find_machine(began + _DAY)
        document["environment"]["selection"] = select
        _, output = session.suite(select, began + _DAY)
        document["complete"] = True
    except Outcome as outcome:
        status, output = 1, outcome.entry.get("output", "")
        document["complete"] = bool(document["rows"] or document["candidates"])
        print(f"\nerror: {outcome}; a provider with wrong results is not timed", file=sys.stderr)
    except KeyboardInterrupt:
        status, output = 1, ""
        print("interrupted: the report has the rows that were measured", file=sys.stderr)
    now = machine.stalled_seconds()
    if stalled is not None and now is not None:
        document["environment"]["contention"] = (now - stalled) / (time.monotonic() - began)
    session.save()
    if show_output:
        print(output)
    measured = [row for row in (*document["rows"], *document["candidates"]) if row["status"] == "ok"]
    if not document["rows"] and not document["candidates"] and not document["ceilings"]:
        session.path.unlink()
        return _nothing(output)
    if not measured:
        print("error: nothing was measured; the reasons are above", file=sys.stderr)
        return 1
    print(f"\n{time.monotonic() - began:.0f} s; results in {session.path}\n")
    return report.main([str(session.path), *(["--markdown"] if markdown else [])]) or status


if __name__ == "__main__":
    sys.exit(main())
