"""`python -m benchmarks`: runs the suite, writes its results as JSON, prints fused against eager.

Everything after `--` goes to pytest, so pytest-benchmark's own table is `python -m benchmarks -- --benchmark-verbose`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.options import add_options, to_arguments

HERE = Path(__file__).resolve().parent
LATEST = HERE / "results" / "latest.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the library against eager PyTorch and torch.compile on this machine.",
        epilog="Arguments after -- go to pytest. The default selection takes about three minutes on two CPU cores.",
        allow_abbrev=False,
    )
    add_options(parser.add_argument)
    parser.add_argument("-k", metavar="WORDS", help="only rows whose name matches, as in pytest: -k 'neck and bf16'")
    parser.add_argument("--list", action="store_true", help="print the rows' names, measure nothing")
    parser.add_argument("--output", type=Path, default=LATEST, metavar="FILE", help="where to write the JSON")
    parser.add_argument("--markdown", action="store_true", help="print the comparison as Markdown")
    return parser


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The runner's arguments, and pytest's after the first `--`."""
    own = list(arguments)
    if "--" not in own:
        return own, []
    cut = own.index("--")
    return own[:cut], own[cut + 1 :]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    own, passed_on = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own)
    if options.full and options.tiny:
        parser.error("--full and --tiny exclude each other")
    command = [str(HERE), *to_arguments(options)]
    if options.k:
        command += ["-k", options.k]
    if options.full:
        command += ["--benchmark-max-time=1"]  # more rounds than pytest.ini gives the quick selection
    if options.tiny:
        command += ["--benchmark-max-time=0.001", "--benchmark-min-rounds=2"]

    import pytest  # after the arguments, so that --help and errors in them are instant

    if options.list:
        return int(pytest.main([*command, "--collect-only", "-qq", *passed_on]))
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.unlink(missing_ok=True)  # a run that dies must not be reported with the last one's figures
    except OSError as error:
        parser.error(f"--output: cannot write {options.output}: {error.strerror}")
    began = time.monotonic()
    status = int(pytest.main([*command, f"--benchmark-json={options.output}", *passed_on]))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            print("error: no row matches; `python -m benchmarks --list` names them", file=sys.stderr)
        return status
    if not options.output.exists():
        print("error: nothing was measured; the reasons are above", file=sys.stderr)
        return status or 1
    print(f"\n{time.monotonic() - began:.0f} s; results in {options.output}\n")
    shown = report.main([str(options.output), *(["--markdown"] if options.markdown else [])])
    if status == pytest.ExitCode.TESTS_FAILED:
        print("\nerror: some rows failed, see above; what does not give eager's result is not timed", file=sys.stderr)
    return status or shown


if __name__ == "__main__":
    sys.exit(main())
