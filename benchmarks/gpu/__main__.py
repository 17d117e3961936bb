"""`python -m benchmarks.gpu`: runs the steps, writes one JSON, prints one table.

--dry-run           walks every step on the CPU, with maps of a few pixels
--table FILE        prints the table of an earlier run
--readme FILE       prints the README's table of an earlier run
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.gpu import table
from benchmarks.gpu.document import Document, DocumentError, gpu_name, load
from benchmarks.gpu.run import Options, Run
from benchmarks.gpu.units import NO_TIME

RESULTS = Path(__file__).resolve().parents[1] / "results"
LATEST = RESULTS / "gpu-latest.json"


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0 minutes, got {text}")
    return value


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Build, test and measure the library on this machine's NVIDIA GPU, within a given time.",
        epilog="Exit status: 0 where every step had its turn and none failed, else 1; 2 for bad arguments or no GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="walk every step on the CPU; its figures mean nothing")
    parser.add_argument("--minutes", type=_minutes, default=8.0, metavar="M", help="end within M minutes (default: 8)")
    parser.add_argument("--steps", metavar="NAMES", help="only these steps, comma-separated; see --list")
    parser.add_argument("--rows", type=_pattern, default="", metavar="REGEX", help="only units whose name matches")
    parser.add_argument("--list", action="store_true", help="print the steps and their shares of the time")
    parser.add_argument(
        "--output", type=Path, default=LATEST, metavar="FILE", help=f"the JSON (default: {LATEST.name})"
    )
    parser.add_argument("--keep", action="store_true", help="also write benchmarks/results/<gpu>-<date>.json")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="what the steps print (default: a new temporary one)"
    )
    parser.add_argument("--commit", metavar="SHA", help="the commit of these sources, where they are no git clone")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with an earlier run: keep its measured rows")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a run and do nothing else")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="print its table for the README instead")
    return parser


def _read(options: argparse.Namespace) -> int:
    try:
        if options.table:
            print(table.to_text(load(options.table)))
        else:
            print(table.to_readme(load(options.readme)), end="")
    except (DocumentError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def kept_name(document: Document) -> str:
    """`nvidia-h200-2026-01-31.json`"""
    name = re.sub(r"[^a-z0-9]+", "-", (gpu_name(document) or "no-gpu").lower()).strip("-")
    return f"{name}-{document['date'][:10]}.json"


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.table or given.readme:
        return _read(given)
    output = given.output.resolve()
    only = tuple(filter(None, (given.steps or "").split(",")))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        logs = (given.logs or Path(tempfile.mkdtemp(prefix="fpn_kernels-gpu-"))).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        parser.error(f"cannot write {error.filename or output}: {error.strerror}")
    try:
        earlier = load(given.resume) if given.resume else None
    except DocumentError as error:
        parser.error(f"--resume: {error}")
    options = Options(output, logs, 60 * given.minutes, given.dry_run, only, given.rows, given.commit, earlier)
    run = Run(options, lambda text: print(text, flush=True))
    known = [step.name for step in run.steps]
    if given.list:
        for step in run.steps:
            print(
                f"{step.name:<14} at most {min(step.most, options.seconds):4.0f} s, {step.reserve:3.0f} s kept for it"
            )
        return 0
    if unknown := [name for name in only if name not in known]:
        parser.error(f"--steps: {unknown[0]!r} is not a step; choose from {', '.join(known)}")
    if given.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever this machine has
    signal.signal(signal.SIGTERM, _terminated)
    try:
        run.execute()
    except KeyboardInterrupt:
        run.save()
        print("interrupted: what was measured until now follows", flush=True)
    document = run.document
    print(f"\n{table.to_text(document, headline=True)}\n")
    print(f"{document['seconds']:.0f} s; logs in {logs}; all rows: benchmarks/gpu.sh --table {output}")
    if run.pointless():
        return 2
    if given.keep and not given.dry_run:
        kept = RESULTS / kept_name(document)
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(output, kept)
        print(f"kept as {kept}")
    own = [step for step in document["steps"] if "earlier" not in step]
    failed = any(step["status"] == "failed" or step.get("reason") == NO_TIME for step in own)
    return 1 if failed or not document["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
