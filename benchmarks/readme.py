"""`python -m benchmarks.readme FILE.json`: the README's table of a CPU run, cases by dtype and layout.

A cell is the ratio to eager, then in brackets that to torch.compile, where it was measured.  `--keep OTHER.json` writes
what is worth keeping of the run: the README's table is made from such a file.  Needs neither torch nor the library.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import ReportError, Results, Row, load

LIBRARY, COMPILED = "fpn_kernels", "torch.compile"
OPERATORS = ("neck", "lateral_connection", "output_conv", "upsample_add", "weighted_merge")
COLUMNS = ("fp32 NCHW", "fp32 NHWC", "bf16 NCHW", "bf16 NHWC")


def _place(row: Row) -> tuple[str, str]:
    """The line and the column of a row: "800x1280 C2 b1 bf16 NHWC" is in the last column."""
    *words, _, dtype, layout = row.case.split()
    size = next(index for index, word in enumerate(words) if re.fullmatch(r"\d+x\d+", word))
    image, spot = " ".join(words[: size + 1]).replace("x", " x "), words[size + 1 :]
    where = image if row.operator == "neck" else f"{' '.join(spot)} of {image}"
    name = "the whole neck" if row.operator == "neck" else f"`{row.operator}`"
    direction = "" if row.direction == "forward" else " forward + backward"
    return f"{name}{direction}, {where}", f"{dtype} {layout}"


def _ratio(row: Row) -> float:
    return statistics.median(row.ratios(row.clock))


def table(results: Results) -> str:
    """Whole necks first; of each operator the forward first, then as they ran.  Only the columns that were measured."""
    compiled = {
        (row.operator, row.direction, row.case): _ratio(row) for row in results.rows if row.provider == COMPILED
    }
    cells: dict[str, dict[str, str]] = {}
    for row in sorted(results.rows, key=lambda row: (OPERATORS.index(row.operator), len(row.direction))):
        if row.provider != LIBRARY or not row.ratios(row.clock):
            continue
        line, column = _place(row)
        ratio, rival = _ratio(row), compiled.get((row.operator, row.direction, row.case))
        brackets = "" if rival is None else f" ({ratio / rival:.2f}x)"
        cells.setdefault(line, {})[column] = f"{ratio:.2f}x{brackets}"
    columns = [column for column in COLUMNS if any(column in row for row in cells.values())]
    head = ["case", *columns]
    lines = [head, ["---"] * len(head), *([line, *(row.get(c, "") for c in columns)] for line, row in cells.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kept(document: Mapping[str, Any]) -> dict[str, Any]:
    """A run without what `benchmarks.records` does not read, the name of the machine among it."""
    machine = {"fpn_kernels": (document.get("machine_info") or {}).get("fpn_kernels")}
    rows = [
        {"extra_info": row["extra_info"], "stats": {"data": row["stats"]["data"]}} for row in document["benchmarks"]
    ]
    return {"machine_info": machine, "datetime": document.get("datetime"), "benchmarks": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--keep", type=Path, metavar="OTHER", help="write the run there, as it is worth keeping")
    given = parser.parse_args(arguments)
    try:
        print(table(load(given.file)), end="")
        if given.keep is not None:
            given.keep.write_text(json.dumps(kept(json.loads(given.file.read_text())), separators=(",", ":")) + "\n")
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
