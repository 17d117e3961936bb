"""The README's table of a CPU run: from known figures, and the one that the README shows from the run that is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmark_runs import entry, write

from benchmarks import readme, records
from benchmarks.gpu import document, table

ROOT = Path(__file__).resolve().parents[1]
CASE = "800x1280 C2 b1 bf16 NHWC"


def test_a_cell_is_the_ratio_to_eager_and_that_to_the_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "run.json",
        entry("eager", [9e-3], case=CASE),
        entry("torch.compile", [2e-3] * 3, [4e-3, 5e-3, 4e-3], case=CASE),
        entry("fpn_kernels", [1e-3] * 3, [3e-3, 5e-3, 3e-3], case=CASE),
    )
    assert readme.main([str(path)]) == 0
    head, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    )
    assert head == ["case", "bf16 NHWC"], "only what was measured"
    assert lines == [["`upsample_add`, C2 of 800 x 1280", "3.00x (1.50x)"]]


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_what_is_kept_gives_the_same_table_and_names_no_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", entry("fpn_kernels", [1e-3] * 3, [3e-3] * 3, case=CASE))
    document = json.loads(path.read_text())
    document["machine_info"] = {"node": "a-host", "fpn_kernels": {"name": "a processor"}}
    path.write_text(json.dumps(document))
    assert readme.main([str(path), "--keep", str(tmp_path / "kept.json")]) == 0
    assert "a-host" not in (tmp_path / "kept.json").read_text()
    before, after = records.load(path), records.load(tmp_path / "kept.json")
    assert readme.table(before) == readme.table(after)
    assert after.machine == {"name": "a processor"}


def test_the_readme_shows_the_runs_that_it_names() -> None:
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"\(benchmarks/results/(cpu-[\w.-]+\.json)\)", text)
    assert sorted(names) == sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("cpu-*.json"))
    for name in names:
        assert readme.table(records.load(ROOT / "benchmarks" / "results" / name)) in text


def test_the_readme_shows_the_gpu_run_that_it_names() -> None:
    text = (ROOT / "README.md").read_text()
    (name,) = re.findall(r"\(benchmarks/results/(nvidia-[\w.-]+\.json)\)", text)
    assert table.to_readme(document.load(ROOT / "benchmarks" / "results" / name)) in text
