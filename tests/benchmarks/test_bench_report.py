"""The report on a run, the comparison of two, and the gate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import GPU, document, gpu_row, not_measured, row, times, write

from benchmarks import report
from benchmarks.records import ReportError, Results, load

LIMITS = (("bandwidth", 5e10), ("bandwidth", 1e11), ("flops bf16", 1e6), ("flops bf16", 1e12))


def _lines(*rows: dict[str, Any], **changes: Any) -> list[list[str]]:
    return [line for table in report.tables(Results.of(document(*rows, **changes))) for line in table.lines]


def test_a_cell_is_the_ratio_the_time_and_the_share_of_the_best_floor() -> None:
    # 10 MB at 100 GB/s are 100 us.
    lines = _lines(row("eager", 4e-4), row("fpn_kernels", 2e-4, 2.0, spread=0.3), ceilings=LIMITS)
    assert lines == [["C2 b1 bf16 NHWC", "100 us", "400 us 25%", "2.00x 200 us 50% ~", "native"]]
    # The limit of another dtype does not count.
    other = _lines(row("fpn_kernels", 2e-4, 2.0), ceilings=(("bandwidth", 1e11), ("flops fp32", 1e12)))
    assert other == [["C2 b1 bf16 NHWC", "-", "400 us", "2.00x 200 us", "native"]]


def test_without_pairs_the_ratio_is_that_of_the_times() -> None:
    lines = _lines(row("eager", 3e-3), row("torch.compile", 2e-3))
    assert lines == [["C2 b1 bf16 NHWC", "-", "3.00 ms", "1.50x 2.00 ms", "-"]]
    assert _lines(row("fpn_kernels", 1e-3)) == [["C2 b1 bf16 NHWC", "-", "-", "1.00 ms", "native"]]


def test_device_time_has_a_table_of_its_own() -> None:
    device, caller = report.tables(Results.of(document(gpu_row(method="events"))))
    assert device.title.endswith("(time on the device)") and device.lines[0][-2] == "4.00x 19.0 us e"
    assert caller.title.endswith("(time the caller waits)") and caller.lines[0][-2] == "2.00x 57.0 us"


def test_tables_are_per_operator_with_the_mean_over_cases() -> None:
    rows = [row("fpn_kernels", 1.0, ratio, case=case) for case, ratio in (("C2", 2.0), ("C3", 8.0))]
    found = list(report.tables(Results.of(document(*rows, row("eager", 1.0, operator="neck")))))
    assert [table.title for table in found] == ["upsample_add, forward", "neck, forward"]
    assert found[0].notes == ["fpn_kernels: 4.00x (geometric mean of 2 cases, 2.00x to 8.00x) eager"]


def test_text_and_markdown_have_the_machine_the_failures_and_the_rows() -> None:
    failures = [{"test": "tests/test_x.py::test_y", "message": "assert 1 == 2\nmore"}]
    rows = [gpu_row(), *(not_measured("fpn_kernels", "no time left", case=f"C{number}") for number in range(3))]
    parts = [{"name": "users", "status": "failed", "seconds": 1.0, "reason": "1 failed"}]
    candidate = {**gpu_row("mine", ratio=1.25), "kind": "candidate"}
    made = document(*rows, ceilings=LIMITS, parts=parts, candidates=[candidate], complete=False, note="a note")
    results = Results.of({**made, "tests": {"failures": failures}, "environment": {"gpu": GPU, "torch": "2.11.0"}})
    text = report.to_text(results)
    for said in (
        *("a note\nINCOMPLETE", "NVIDIA H200 (sm_90, 132 multiprocessors, 60 MB of L2)", "torch 2.11.0"),
        *("copy 100 GB/s, bf16 1 TFLOP/s", "tests/test_x.py::test_y: assert 1 == 2\n", "users          failed"),
        *("upsample_add forward C0 fpn_kernels and 2 more: not measured: no time left", "4.00x 19.0 us"),
        "candidate upsample_add forward 800x1280 C2 b1 bf16 NHWC mine: 19.0 us, 1.25x what serves",
    ):
        assert said in text, said
    assert "| 800x1280 C2 b1 bf16 NHWC | 100 us | 76.0 us" in report.to_markdown(results)


def test_a_contended_run_says_so() -> None:
    made = document(row("eager", 1.0), environment={"cpu": "a CPU", "contention": 0.4})
    assert "NOT QUIET: for 40%" in report.to_text(Results.of(made))
    made["environment"]["contention"] = 0.01
    assert "NOT QUIET" not in report.to_text(Results.of(made))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-7, "0.12 us"), (9.999e-6, "10.0 us"), (9.999e-4, "1.00 ms"), (0.0123, "12.3 ms"), (2.5, "2.50 s")],
)
def test_seconds_have_a_fitting_unit(seconds: float, text: str) -> None:
    assert report.format_seconds(seconds) == text


# ---- two runs


def _run(path: Path, ratios: dict[str, float], eager: float = 1e-3, spread: float = 0.01, cpu: str = "a CPU") -> Path:
    """A run with `fpn_kernels` so many times as fast as eager, by case."""
    rows = [row("fpn_kernels", eager / ratio, ratio, spread, case=case) for case, ratio in ratios.items()]
    rows += [row("eager", eager, case=case) for case in ratios]
    return write(path, *rows, environment={"cpu": cpu, "torch": "2.13.0"})


def test_the_change_is_that_of_the_ratio_not_of_the_machine(tmp_path: Path) -> None:
    # The second machine is half as fast; against eager, C2 is as it was and C3 has lost a quarter.
    before = load(_run(tmp_path / "before.json", {"C2": 2.0, "C3": 2.0}))
    now = load(_run(tmp_path / "now.json", {"C2": 2.0, "C3": 1.5}, eager=2e-3, cpu="another"))
    (table,) = report.change_tables(now, before)
    assert table.lines == [
        ["C2", "fpn_kernels", "2.00x 500 us", "2.00x 1.00 ms", "1.00x", ""],
        ["C3", "fpn_kernels", "2.00x 500 us", "1.50x 1.33 ms", "0.75x", "slower"],
    ]
    assert "the machine: 0.50x (geometric mean of 2 cases, 0.50x to 0.50x)" in table.notes
    assert report.differences(now, before) == ["cpu: a CPU before, another now"]


def test_a_change_within_the_spread_of_the_rounds_is_not_called_one(tmp_path: Path) -> None:
    before = load(_run(tmp_path / "0.json", {"C2": 1.0}, spread=0.5))
    words = []
    for ratio in (1.2, 3.0):
        now = load(_run(tmp_path / "1.json", {"C2": ratio}, spread=0.5))
        words += [line[-1] for table in report.change_tables(now, before) for line in table.lines]
    assert words == ["", "faster"]


def test_runs_without_a_common_row_cannot_be_compared(tmp_path: Path) -> None:
    now, before = (load(_run(tmp_path / f"{case}.json", {case: 2.0})) for case in ("C2", "C3"))
    assert report.differences(now, before) == ["2 rows only in the run before", "2 rows only in the run now"]
    with pytest.raises(ReportError, match="no row in common"):
        list(report.change_tables(now, before))


def test_the_gate_names_the_rows_that_are_too_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_run(tmp_path / "run.json", {"C2": 1.5, "C3": 0.9, "C4": 0.8999}))
    assert report.main([path, "--no-files", "--fail-below", "0.8"]) == 0
    assert capsys.readouterr().err == ""
    assert report.main([path, "--no-files", "--fail-below", "1"]) == report.TOO_SLOW
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " upsample_add, forward, C4",
        " upsample_add, forward, C3",
    ]
    older = str(_run(tmp_path / "older.json", {"C2": 2.0, "C3": 0.9, "C4": 0.5}))
    against = [path, "--no-files", "--compare", older, "--fail-below"]
    assert report.main([*against, "0.7"]) == 0  # C4 is slower than eager, and faster than it was
    assert report.main([*against, "0.95"]) == report.TOO_SLOW
    assert "too slow: upsample_add, forward, C2: 0.75x its speed before" in capsys.readouterr().err


def test_a_gate_that_can_judge_nothing_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.json", row("eager", 1e-3), row("torch.compile", 1e-3, 1.0))
    assert report.main([str(path), "--no-files", "--fail-below", "0.5"]) == 1
    assert "no row of fpn_kernels can be judged" in capsys.readouterr().err
    for wrong in ("0", "-1", "nan", "fast"):
        with pytest.raises(SystemExit):
            report.main([str(path), f"--fail-below={wrong}"])


# ---- files


def test_the_page_and_the_picture_are_written_next_to_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")
    image = pytest.importorskip("PIL.Image", reason="the picture is read with Pillow")
    rows = [
        each
        for operator, case in (("upsample_add", "C2"), ("upsample_add", "C3"), ("neck", "C2..C5"))
        for each in (
            row("eager", 1e-3, operator=operator, case=case),
            row("fpn_kernels", 5e-4, 2.0, operator=operator, case=case),
            row("another", 9e-4, 1.1, operator=operator, case=case, direction="forward+backward"),
        )
    ]
    path = write(tmp_path / "run.json", *rows, ceilings=LIMITS, environment={"cpu": "a CPU"})
    assert report.main([str(path)]) == 0
    page = (tmp_path / "run.md").read_text()
    assert report.to_markdown(load(path)) in page and "(run.png)" in page
    with image.open(tmp_path / "run.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0x8C, 0x8C, 0x8C), (0xCC, 0x79, 0xA7)} <= colours  # drawn, not blank


def test_without_matplotlib_there_is_the_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "run.json", row("fpn_kernels", 1e-3, 2.0, host=times(1e-3, 2.0)))
    (tmp_path / "run.png").write_bytes(b"of an earlier run")
    assert report.main([str(path)]) == 0
    assert "no picture: import of matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run.png").exists() and "run.png" not in (tmp_path / "run.md").read_text()
    (tmp_path / "run.md").unlink()
    (tmp_path / "run.md").mkdir()
    assert report.main([str(path)]) == 1 and "cannot write to" in capsys.readouterr().err
