"""Files of a run: those that are kept, those of older formats, and those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import document, gpu_row, row, write

from benchmarks import records, report


def test_a_file_of_pytest_benchmark_is_read(tmp_path: Path) -> None:
    info = {**row("fpn_kernels", 1.0), "eager_times": [2.0, 2.2, 4.0]}
    ceiling = {"ceiling": "bandwidth", "source": "copy", "amount": 10**8}
    old = {
        "machine_info": {"fpn_kernels": {"device_name": "a CPU", "backends": ["native"]}},
        "datetime": "2026-01-31",
        "benchmarks": [
            {"extra_info": info, "stats": {"data": [1.0, 1.1, 1.0]}},
            {"extra_info": ceiling, "stats": {"data": [4e-3, 1e-3]}},
        ],
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    results = records.load(tmp_path / "old.json")
    (found,) = results.rows
    assert found.median("caller") == 1.0 and found.ratio("caller") == pytest.approx(2.0) and found.served_by == "native"
    assert results.ceiling("bandwidth") == 1e11 and results.machine["cpu"] == "a CPU"


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*-????-??-??.json")), ids=lambda path: path.name)
def test_a_run_that_is_kept_is_read(path: Path) -> None:
    results = records.load(path)
    assert len(results.rows) > 50 and (results.gpu is None) == path.name.startswith("cpu-")
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("", "is not JSON, or its run did not finish"),
        (json.dumps(document(gpu_row()))[:-100], "is not JSON, or its run did not finish"),
        ("[1, 2]", "is not the file of a run"),
        ('{"format": "other"}', "is not of the format"),
        (document(version=99), "is not of the format"),
        (document(row("fpn_kernels", 1.0, caller=3)), "is not the file of a run"),
        (document({"status": "ok"}), "is not the file of a run"),
        ({"benchmarks": [{"name": "x", "stats": {"data": [1]}, "extra_info": {}}]}, "holds no benchmark"),
    ],
)
def test_a_file_that_is_no_run_is_refused(
    tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(records.ReportError, match=message):
        records.load(path)
    assert report.main([str(path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for seconds in (1.0, 2.0):
        path = write(tmp_path / "run.json", gpu_row(), seconds=seconds)
        assert records.load(path).document["seconds"] == seconds
    assert list(tmp_path.iterdir()) == [path]
