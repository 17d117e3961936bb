"""The tables of the documents: from known figures, and those that the documents show from the runs that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import GPU, document, gpu_row, not_measured, row, write

from benchmarks import documents, records
from benchmarks.records import ReportError, Results

ROOT = Path(__file__).resolve().parents[2]
LIMITS = (("bandwidth", 4.3e12), ("flops bf16", 790e12))
# C2, bf16 NHWC, batch 1: 43 MB, hence 10 us at these limits.
BYTES = {"bytes": 43_000_000}


def _results(*rows: dict[str, Any], gpu: str = "NVIDIA H200", **changes: Any) -> Results:
    environment = {"gpu": {**GPU, "name": gpu}}
    return Results.of(document(*rows, ceilings=LIMITS, environment=environment, **changes))


def _rivals(compiled: float = 2.0, tuned: float = 2.5) -> list[dict[str, Any]]:
    # They ran while the GPU was half as fast; their ratios to eager are the same.
    rivals = (("torch.compile", compiled), ("torch.compile max-autotune", tuned))
    return [gpu_row(name, 76e-6, ratio, **BYTES) for name, ratio in rivals]


def test_a_gpu_table_has_the_rows_of_the_library_and_their_targets() -> None:
    lost = not_measured("fpn_kernels", "no time left", case="other")
    forced = gpu_row("fpn_kernels/triton", **BYTES)
    head, grid = documents.table(_results(gpu_row(**BYTES), *_rivals(), forced, lost)).split("\n\n")
    assert "NVIDIA H200 (sm_90" in head and head.endswith("targets: 1 of 1 rows meet theirs")
    assert grid.splitlines()[2:] == [
        "| `upsample_add`, 800x1280 C2 b1 bf16 NHWC | 19.0 us | 53% | 4.00x | 2.00x | 1.60x |"
        " 57.0 us (eager 114 us) | <= 19.5 us, >= 3x eager, >= 1x compile: met |"
    ]


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([gpu_row(own=19.6e-6), *_rivals()], "time not met"),
        ([gpu_row(own=19.5e-6), *_rivals()], "met"),
        ([gpu_row(ratio=2.9), *_rivals()], "eager not met"),
        ([gpu_row(), *_rivals(tuned=4.1)], "compile not met"),
        ([gpu_row(own=1e-3, ratio=0.5), *_rivals()], "time not met; eager not met; compile not met"),
        ([gpu_row(), _rivals()[0]], "compile not measured"),
        ([gpu_row(dtype="fp16")], "-"),
        ([gpu_row(batch=8)], "-"),
        ([gpu_row(layout="NCHW", own=1.0, ratio=3.0)], "met"),  # the ratio to eager alone counts there
        ([gpu_row(layout="NCHW", ratio=2.0)], "eager not met"),
    ],
)
def test_met_or_not(rows: list[dict[str, Any]], verdict: str) -> None:
    results = _results(*rows)
    assert documents.verdict(results, results.rows[0]) == verdict
    assert documents.verdict(_results(*rows, gpu="NVIDIA A100-SXM4-80GB"), results.rows[0]) == "-"


def test_a_table_is_of_measured_figures_alone() -> None:
    for results in (_results(gpu_row(), dry_run=True), _results(not_measured("fpn_kernels", "no time left"))):
        with pytest.raises(ReportError, match="no row of this run was measured on a GPU"):
            documents.table(results)


def test_a_cpu_table_has_the_ratio_to_eager_and_to_the_compiler() -> None:
    case = {"case": "800x1280 C2 b1 bf16 NHWC"}
    rows = [row("eager", 9e-3, **case), row("torch.compile", 2e-3, 2.0, **case), row("fpn_kernels", 1e-3, 3.0, **case)]
    assert documents.table(Results.of(document(*rows))).splitlines() == [
        *("| case | bf16 NHWC |", "| --- | --- |"),
        "| `upsample_add`, C2 of 800 x 1280 | 3.00x (1.50x) |",
    ]


def test_a_document_gets_the_table_of_the_run_that_it_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    run = write(tmp_path / "run.json", row("fpn_kernels", 1e-3, 3.0, case="800x1280 C2 b1 bf16 NHWC"))
    kept = documents.keep(run, "cpu-x")
    page = tmp_path / "page.md"
    page.write_text("# A\n\n[run](../benchmarks/results/cpu-x.json):\n\n| case |\n| --- |\n| old |\n\nThe end.\n")
    assert documents.main(["--document", str(page)]) == 1  # it reads the project's own results
    text = documents.updated(page.read_text(), kept.parent)
    assert "| old |" not in text and "| 3.00x |\n\nThe end." in text and documents.updated(text, tmp_path) == text
    with pytest.raises(ReportError, match="no table follows the link to cpu-x.json"):
        documents.updated("(benchmarks/results/cpu-x.json)\n", tmp_path)
    with pytest.raises(ReportError, match="dry run"):
        documents.keep(write(tmp_path / "dry.json", gpu_row(), dry_run=True), "cpu-y")


def test_the_documents_show_the_runs_that_are_kept() -> None:
    kept = {path.name for path in records.RESULTS.glob("*-????-??-??.json")}
    if not kept:
        pytest.skip("the source distribution has no results")
    texts = [path.read_text() for path in (documents.DOCUMENT, ROOT / "README.md")]
    assert {name for text in texts for name in documents.linked(text)} == kept
    for text in texts:
        assert documents.updated(text) == text, "run `python -m benchmarks.documents`"
