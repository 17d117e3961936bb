"""What a GPU run's figures come to: targets met or not, ratios, floors, the table and the README's Markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import EVEN, MAX_AUTOTUNE
from benchmarks.gpu import document as documents
from benchmarks.gpu import rows, table, targets
from benchmarks.gpu.__main__ import kept_name, main
from benchmarks.gpu.document import Document, DocumentError, lines
from fpn_kernels import roofline

ROOT = Path(__file__).resolve().parent.parent
NOTE = "SYNTHETIC FIGURES OF A TEST, measured on nothing"


def _summary(own: float, ratio: float) -> dict[str, float]:
    return {"own": own, "eager": own * ratio, "ratio": ratio, "spread": 0.01, "rounds": 25}


def _row(provider: str = "fpn_kernels", seconds: float = 19e-6, ratio: float = 4.0, **changes: Any) -> dict[str, Any]:
    """C2, bf16 NHWC, batch 1 of upsample_add: 43 MB, hence 10 us at the document's ceilings."""
    return {
        "operator": "upsample_add",
        "direction": "forward",
        "case": "800x1280 C2 b1 bf16 NHWC",
        "level": 2,
        "batch": 1,
        "dtype": "bf16",
        "layout": "NHWC",
        "provider": provider,
        "status": "ok",
        "bytes": 43_000_000,
        "flops": 10**6,
        "served_by": {"upsample_add": "triton"} if provider.startswith("fpn_kernels") else {},
        "method": "graph",
        "device": _summary(seconds, ratio),
        "caller": _summary(3 * seconds, ratio / 2),
        "host": _summary(2 * seconds, ratio / 2),
        **changes,
    }


def _not_measured(provider: str, reason: str, **changes: Any) -> dict[str, Any]:
    row = _row(provider, **changes)
    for name in ("bytes", "flops", "served_by", "method", "device", "caller", "host"):
        del row[name]
    return {**row, "status": "not measured", "reason": reason}


def _document(*entries: dict[str, Any], gpu: str | None = "NVIDIA H200") -> Document:
    document = documents.empty(dry_run=False, date="2026-01-31T12:00:00", limit_seconds=480)
    found = {"name": gpu, "capability": "sm_90", "multiprocessors": 132, "l2_bytes": 60_000_000}
    document["environment"] = {"gpu": found if gpu else None, "torch": "2.11.0", "nvidia_smi": None}
    document["ceilings"] = [
        {"limit": "bandwidth", "source": "copy", "rate": 2.0e12},
        {"limit": "bandwidth", "source": "copy", "rate": 4.3e12},
        {"limit": "flops bf16", "source": "matrix product", "rate": 790e12},
    ]
    return {**document, "rows": list(entries), "note": NOTE, "complete": True}


def _rivals(compiled: float = 2.0, tuned: float = 2.5) -> list[dict[str, Any]]:
    return [_row("torch.compile", ratio=compiled), _row("torch.compile max-autotune", ratio=tuned)]


def _only(document: Document) -> documents.Line:
    (line,) = lines(document)
    return line


def test_ratios_floor_and_verdict_of_a_row() -> None:
    line = _only(_document(_row(), *_rivals()))
    assert line.eager == 4.0 and line.compiled == 2.0 and line.tuned == 1.6
    assert line.floor == pytest.approx(10e-6) and line.share == pytest.approx(10 / 19)
    assert line.verdict() == "met"


def test_ratio_to_a_rival_does_not_move_with_the_clock_rate() -> None:
    # The rival and its eager rounds ran while the GPU was twice as slow: 2.5x eager all the same.
    slow = _row("torch.compile max-autotune", seconds=76e-6, ratio=2.5)
    assert _only(_document(_row(), slow)).tuned == 1.6


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ([_row(seconds=19.6e-6), *_rivals()], "time not met"),
        ([_row(seconds=19.5e-6), *_rivals()], "met"),
        ([_row(ratio=2.9), *_rivals()], "eager not met"),
        ([_row(), *_rivals(tuned=4.1)], "compile not met"),
        ([_row(seconds=1e-3, ratio=0.5), *_rivals()], "time not met; eager not met; compile not met"),
        ([_row(), _rivals()[0]], "compile not measured"),
        ([_row(), _not_measured("torch.compile max-autotune", "budget: 90 s")], "compile not measured"),
        ([_not_measured("fpn_kernels", "no time left"), *_rivals()], "not measured"),
        ([_row(dtype="fp16")], "-"),
        ([_row(batch=8)], "-"),
        ([_row(layout="NCHW", seconds=1.0, ratio=3.0)], "met"),  # eager alone counts there
        ([_row(layout="NCHW", ratio=2.0)], "eager not met"),
    ],
)
def test_met_or_not(measured: list[dict[str, Any]], verdict: str) -> None:
    assert _only(_document(*measured)).verdict() == verdict


def test_an_unknown_gpu_has_no_targets() -> None:
    document = _document(_row(), *_rivals(), gpu="NVIDIA A100-SXM4-80GB")
    line = _only(document)
    assert line.target is None and line.verdict() == "-" and line.eager == 4.0
    assert table.verdicts(document) == "targets: none are set for NVIDIA A100-SXM4-80GB"


def test_only_what_a_user_gets_has_a_target() -> None:
    document = _document(_row(), _row("fpn_kernels/triton"), *_rivals())
    assert [(line.entry["provider"], line.target is not None) for line in lines(document)] == [
        ("fpn_kernels", True),
        ("fpn_kernels/triton", False),
    ]
    assert table.verdicts(document) == "targets: 1 of 1 rows meet theirs"


def _cost(target: targets.Target) -> roofline.Cost:
    """What the row costs at least, from the shapes of the image."""
    shapes = {level: (target.batch, *EVEN.level(level)) for level in (2, 3, 4, 5)}
    merged = {level: (target.batch, 256, *shape[2:]) for level, shape in shapes.items()}
    sizes = {level: shapes[level + 1][2:] if level < 5 else None for level in shapes}
    dtype = torch.bfloat16
    if target.operator in ("top_down_pathway", "neck"):
        whole = roofline.top_down_pathway if target.operator == "top_down_pathway" else roofline.neck
        options = {} if target.operator == "top_down_pathway" else {"pool": False}
        return whole(list(shapes.values()), 256, dtype, **options)
    of_level = {
        "upsample_add": lambda level: roofline.upsample_add(merged[level], sizes[level], dtype),
        "lateral_connection": lambda level: roofline.lateral_connection(shapes[level], 256, sizes[level], dtype),
        "output_conv": lambda level: roofline.output_conv(merged[level], 256, dtype),
    }[target.operator]
    coarsest = 4 if target.operator == "upsample_add" else 5
    levels = [target.level] if target.level else range(2, coarsest + 1)
    return sum((of_level(level) for level in levels), start=roofline.Cost(0, 0))


# Bytes and operations a second that `targets` names.
RATES = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}


@pytest.mark.parametrize(
    ("gpu", "target"),
    [(gpu, target) for gpu, aims in targets.TARGETS.items() for target in aims if target.seconds is not None],
    ids=str,
)
def test_a_target_is_possible_at_the_rates_it_is_noted_for(gpu: str, target: targets.Target) -> None:
    """Never below the floor of its row, and at most two thirds more."""
    floor = _cost(target).floor(*RATES[gpu])
    assert 0.6 * target.seconds <= floor < target.seconds


def test_every_row_with_a_target_is_measured() -> None:
    names = ("operator", "direction", "level", "batch", "dtype", "layout")

    def keys(units: list[dict[str, Any]], provider: str) -> set[tuple[Any, ...]]:
        return {tuple(unit[name] for name in names) for unit in units if unit["provider"] == provider}

    aimed = {tuple(getattr(target, name) for name in names) for target in targets.TARGETS["NVIDIA H200"]}
    headline = {key for key in aimed if key[-1] == "NHWC"}
    plan = rows.Plan()
    assert headline <= keys(plan.headline(), "fpn_kernels") and headline == keys(plan.max_autotune(), MAX_AUTOTUNE)
    assert aimed - headline <= keys(plan.others(), "fpn_kernels")


def test_a_rival_that_was_not_measured_says_why() -> None:
    line = _only(_document(_row(), _not_measured("torch.compile max-autotune", "budget: not done within 90 s")))
    assert line.tuned is None
    assert line.reasons == {"torch.compile max-autotune": "budget: not done within 90 s"}


def test_text_has_the_machine_the_rows_and_what_failed() -> None:
    lost = {"status": "failed", "reason": "the worker ended: killed by SIGSEGV"}
    document = _document(_row(), *_rivals(), {**_not_measured("fpn_kernels", "", case="other", level=4), **lost})
    document["tests"] = dict.fromkeys(("collected", "passed", "failed", "skipped", "crashed", "not_run"), 1)
    document["tests"]["failures"] = [{"test": "tests/test_x.py::test_y", "message": "assert 1 == 2\nmore"}]
    document["complete"] = False
    text = table.to_text(document)
    assert text.startswith(NOTE) and "INCOMPLETE" in text and "copy 4300 GB/s, bf16 790 TFLOP/s" in text
    row = next(line for line in text.splitlines() if line.startswith("upsample_add 800x1280"))
    assert re.split(r"  +", row)[1:6] == ["19.0 us", "53%", "76.0 us", "4.00x", "2.00x"]
    assert row.endswith("<= 19.5 us, >= 3x eager, >= 1x compile  met")
    assert "tests/test_x.py::test_y: assert 1 == 2\n" in text and text.count("killed by SIGSEGV") == 1


def test_the_end_of_a_run_shows_the_headline_and_counts_the_rest() -> None:
    rest = [_not_measured("fpn_kernels", "no time left", case=f"case {number}", dtype="fp32") for number in range(7)]
    text = table.to_text(_document(_row(), _row(dtype="fp16", case="another case"), *rest), headline=True)
    assert "upsample_add 800x1280 C2 b1 bf16 NHWC" in text and "upsample_add another case" not in text
    assert "rows: 2 ok, 7 not measured" in text
    assert "upsample_add forward case 0 fpn_kernels and 6 more: not measured: no time left" in text
    assert len(text) < 3000


def test_events_are_marked() -> None:
    assert "19.0 us e " in table.to_text(_document(_row(method="events")))


def test_memory_of_a_training_step() -> None:
    row = _row(direction="forward+backward", peak_bytes={"own": 100, "eager": 250})
    assert " 2.50x " in table.to_text(_document(row))


def test_readme_holds_what_was_measured_and_nothing_else() -> None:
    other = _not_measured("fpn_kernels", "no time left", case="other")
    text = table.to_readme(_document(_row(), *_rivals(), _row("fpn_kernels/triton"), other))
    header, rule, *body = [line for line in text.splitlines() if line.startswith("|")]
    assert set(rule) <= set("| -") and header.count("|") == rule.count("|")
    assert body == [
        "| `upsample_add`, 800x1280 C2 b1 bf16 NHWC | 19.0 us | 53% | 4.00x | 2.00x | 1.60x |"
        " 57.0 us (eager 114 us) | <= 19.5 us, >= 3x eager, >= 1x compile: met |"
    ]
    assert NOTE in text and "2026-01-31" in text and "torch 2.11.0" in text


def test_readme_refuses_what_no_gpu_measured() -> None:
    dry = {**_document(_row(), gpu=None), "dry_run": True}
    with pytest.raises(ValueError, match="without a GPU"):
        table.to_readme(dry)
    with pytest.raises(ValueError, match="without a GPU"):
        table.to_readme({**_document(_row()), "dry_run": True})
    with pytest.raises(ValueError, match="no row was measured"):
        table.to_readme(_document(_not_measured("fpn_kernels", "no time left")))


def test_the_command_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    documents.write(_document(_row(), *_rivals()), path)
    assert main(["--table", str(path)]) == 0
    assert "targets: 1 of 1 rows meet theirs" in capsys.readouterr().out
    assert main(["--readme", str(path)]) == 0
    assert capsys.readouterr().out == table.to_readme(_document(_row(), *_rivals()))


def _broken(change: Any) -> Any:
    document = _document(_row())
    change(document)
    return document


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("{", "is not JSON"),
        ("[]", "not a document of the format"),
        ('{"format": "other"}', "not a document of the format"),
        (_broken(lambda d: d.update(version=99)), "version 99, where this reads 1"),
        (_broken(lambda d: d.pop("ceilings")), "the document lacks 'ceilings'"),
        (_broken(lambda d: d.update(rows={})), "the document: 'rows' is dict"),
        (_broken(lambda d: d["rows"][0].pop("dtype")), r"rows\[0\] lacks 'dtype'"),
        (_broken(lambda d: d["rows"][0].update(level="2")), r"rows\[0\]: 'level' is str"),
        (_broken(lambda d: d["rows"][0].pop("caller")), r"rows\[0\] lacks 'caller'"),
        (_broken(lambda d: d["rows"].append(3)), r"rows\[1\] is no object"),
    ],
)
def test_a_file_that_is_no_run_is_refused(
    tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DocumentError, match=message):
        documents.load(path)
    assert main(["--table", str(path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for seconds in (1.0, 2.0):
        documents.write({**_document(_row()), "seconds": seconds}, path)
        assert documents.load(path)["seconds"] == seconds
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_of_a_result_that_is_kept() -> None:
    assert kept_name(_document()) == "nvidia-h200-2026-01-31.json"


def test_every_gpu_figure_of_the_readme_comes_from_a_file_that_is_here() -> None:
    """Each run that is kept is one of a GPU, and the README's table is that of the newest, or is not there."""
    readme = (ROOT / "README.md").read_text()
    results = (ROOT / "benchmarks" / "results").glob("*-????-??-??.json")
    # Those of a CPU are test_benchmark_readme.py's.
    kept = sorted((path for path in results if not path.name.startswith("cpu-")), key=lambda path: path.name[-15:])
    shown = [table.to_readme(documents.load(path)) for path in kept]
    header = table.to_readme(_document(_row())).split("\n\n")[1].splitlines()[0]
    assert (header in readme) == bool(shown)
    assert not shown or any(text in readme for text in shown)


def test_a_choice_that_is_not_the_fastest_candidate_is_named() -> None:
    def entry(call: str, default: str, **times: float) -> dict[str, Any]:
        return {"call": call, "default": default, "microseconds": times}

    document = _document(_row())
    document["candidates"] = [
        {
            "id": "candidates a",
            "status": "ok",
            "measured": [
                entry("op 1", "large", large=20.0, small=10.0),
                entry("op 2", "large", large=10.4, small=10.0),  # noise
                entry("op 3", "huge", small=10.0),
                entry("op 4", "huge"),
            ],
        },
        {"id": "candidates b", "status": "failed", "reason": "RuntimeError: no"},
    ]
    assert not list(documents.problems(document))
    said = "\n".join(table.summary(document))
    assert "candidates: 1 ok, 1 failed; 3 classes of calls" in said
    assert "op 1: large takes 20.0 us, small 10.0 us (2.00x)" in said and "op 2" not in said
    assert "op 3: huge does not run, small takes 10.0 us" in said and "op 4: huge: no candidate runs" in said
    assert "candidates b: failed: RuntimeError: no" in said
