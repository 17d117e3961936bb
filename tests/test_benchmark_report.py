"""The report on a run: what it says of known figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import ceiling, entry, write

from benchmarks import comparison, report


def _only_line(path: Path) -> list[str]:
    (table,) = report.tables(report.load(path))
    (line,) = table.lines
    return line


def test_ratio_is_the_median_over_pairs_of_rounds(tmp_path: Path) -> None:
    # Eager's own row was measured while the machine was twice as fast: the pairs, not that row, give the ratio.
    path = write(
        tmp_path / "run.json",
        entry("eager", [1e-3, 1e-3, 1e-3]),
        entry("fpn_kernels", [1e-3, 1.1e-3, 1e-3], [2e-3, 2.2e-3, 4e-3], served_by={"upsample_add": "native"}),
    )
    assert _only_line(path) == ["C2 b1 bf16 NHWC", "-", "1.00 ms", "2.00x 1.00 ms ~", "native"]


def test_ratio_without_pairs_is_that_of_the_medians(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", entry("eager", [3e-3]), entry("torch.compile", [1e-3, 2e-3, 9e-3]))
    (table,) = report.tables(report.load(path))
    assert table.lines[0][3].startswith("1.50x 2.00 ms")
    assert table.notes == ["torch.compile: 1.50x eager (geometric mean of 1 case, 1.50x to 1.50x)"]


def test_missing_eager_row_is_filled_from_the_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", entry("fpn_kernels", [1e-3] * 4, [5e-3] * 4))
    assert _only_line(path) == ["C2 b1 bf16 NHWC", "-", "5.00 ms", "5.00x 1.00 ms", "-"]


def test_missing_eager_row_and_pairs_give_no_ratio(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", entry("fpn_kernels", [1e-3] * 4))
    (table,) = report.tables(report.load(path))
    assert table.lines == [["C2 b1 bf16 NHWC", "-", "-", "1.00 ms", "-"]]
    assert table.notes == []


def test_floor_takes_the_best_ceiling_seen(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.json",
        ceiling("bandwidth", "copy", 10**8, [1e-3, 2e-3]),  # 100 GB/s: 10 MB in 0.1 ms
        ceiling("bandwidth", "copy", 10**8, [4e-3]),
        ceiling("flops bf16", "matrix product", 10**6, [1.0]),  # 1 MFLOP/s, beside a convolution of 1 TFLOP/s
        ceiling("flops bf16", "3x3 convolution", 10**12, [1.0]),
        entry("eager", [4e-4, 4e-4]),
        entry("fpn_kernels", [2e-4, 2e-4], [4e-4, 4e-4]),
    )
    assert _only_line(path) == ["C2 b1 bf16 NHWC", "100 us", "400 us 25%", "2.00x 200 us 50%", "-"]


def test_ceiling_of_another_dtype_does_not_count(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.json",
        ceiling("bandwidth", "copy", 10**8, [1e-3]),
        ceiling("flops fp32", "matrix product", 10**12, [1.0]),
        entry("eager", [4e-4]),
    )
    assert _only_line(path)[1] == "-"


def test_device_time_gets_a_table_of_its_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.json",
        entry("eager", [9e-4], device_times=[2e-4]),
        entry("fpn_kernels", [9e-4], [9e-4], device_times=[5e-5], eager_device_times=[2e-4]),
    )
    device, caller = report.tables(report.load(path))
    assert device.title.endswith("(time on the device)") and device.lines[0][3].startswith("4.00x 50.0 us")
    assert caller.title.endswith("(time the caller waits)") and caller.lines[0][3].startswith("1.00x 900 us")


def test_grouping_and_mean_over_cases(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.json",
        *(
            row
            for case, ratio in (("C2", 2.0), ("C3", 8.0))
            for row in (
                entry("eager", [1.0], case=case),
                entry("fpn_kernels", [1.0], [ratio], case=case),
            )
        ),
        entry("eager", [1.0], operator="neck", direction="forward+backward"),
    )
    upsample, neck = report.tables(report.load(path))
    assert [line[0] for line in upsample.lines] == ["C2", "C3"]
    assert upsample.notes == ["fpn_kernels: 4.00x eager (geometric mean of 2 cases, 2.00x to 8.00x)"]
    assert neck.title == "neck, forward+backward" and neck.header == ["case", "floor", "eager", "served by"]


def test_text_and_markdown_hold_the_same_cells(tmp_path: Path) -> None:
    results = report.load(
        write(tmp_path / "run.json", entry("eager", [1e-3] * 2), entry("fpn_kernels", [5e-4] * 2, [1e-3] * 2))
    )
    for text in (report.to_text(results), report.to_markdown(results)):
        assert "2.00x 500 us" in text and "no ceilings" not in text.splitlines()[0]
    assert "| C2 b1 bf16 NHWC | - | 1.00 ms | 2.00x 500 us | - |" in report.to_markdown(results)


def test_a_contended_run_says_so(tmp_path: Path) -> None:
    machine = {"fpn_kernels": {"device_name": "a CPU", "backends": ["eager"], "contention": 0.4}}
    results = report.load(write(tmp_path / "run.json", entry("eager", [1.0]), machine_info=machine))
    assert "NOT QUIET: for 40%" in report.to_text(results)
    results.machine["contention"] = 0.01
    assert "NOT QUIET" not in report.to_text(results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[1, 2]", "is not a file of pytest-benchmark's"),
        ('{"a": 1}', "is not a file of pytest-benchmark's"),
        ('{"benchmarks": []}', "holds 0 benchmarks, none of them from this suite"),
        ('{"benchmarks": [{"name": "x", "stats": {"data": [1]}, "extra_info": {}}]}', "holds 1 benchmarks, none"),
    ],
)
def test_a_file_that_cannot_be_reported(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(report.ReportError, match=message):
        report.load(path)
    assert report.main([str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-7, "0.12 us"), (9.999e-6, "10.0 us"), (9.999e-4, "1.00 ms"), (0.0123, "12.3 ms"), (2.5, "2.50 s")],
)
def test_seconds_are_shown_with_a_fitting_unit(seconds: float, text: str) -> None:
    assert report.format_seconds(seconds) == text


def _run(
    path: Path,
    *,
    ratios: dict[str, float],
    eager: float = 1e-3,
    rounds: int = 8,
    machine: str = "a CPU",
    **options: Any,
) -> Path:
    """A run with `fpn_kernels` so many times as fast as eager, by case."""
    entries = []
    for case, ratio in ratios.items():
        times = [eager * (1 + 0.01 * (i % 4)) for i in range(rounds)]
        entries.append(entry("eager", times, case=case, **options))
        entries.append(entry("fpn_kernels", [time / ratio for time in times], times, case=case, **options))
    return write(path, *entries, machine_info={"fpn_kernels": {"device_name": machine, "torch": "2.13.0"}})


def test_the_change_is_that_of_the_ratio_not_of_the_machine(tmp_path: Path) -> None:
    # The second machine is twice as slow as a whole; against eager, C2 is as it was and C3 has lost a quarter.
    before = report.load(_run(tmp_path / "before.json", ratios={"C2": 2.0, "C3": 2.0}))
    now = report.load(_run(tmp_path / "now.json", ratios={"C2": 2.0, "C3": 1.5}, eager=2e-3, machine="another"))
    (table,) = comparison.tables(now, before)
    assert table.title == "upsample_add, forward: change"
    assert table.lines == [
        ["C2", "fpn_kernels", "2.00x 508 us", "2.00x 1.02 ms", "1.00x", ""],
        ["C3", "fpn_kernels", "2.00x 508 us", "1.50x 1.35 ms", "0.75x", "slower"],
    ]
    assert "the machine's own change: 0.50x (geometric mean of 2, 0.50x to 0.50x)" in table.notes
    assert comparison.differences(now, before) == ["device_name: a CPU before, another now"]


def test_a_change_within_the_spread_of_the_rounds_is_not_called_one(tmp_path: Path) -> None:
    def noisy(name: str, shift: float) -> report.Results:
        ratios = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
        own = [1e-3 / (ratio * shift) for ratio in ratios]
        return report.load(write(tmp_path / name, entry("fpn_kernels", own, [1e-3] * len(own))))

    before, near, far = noisy("0.json", 1.0), noisy("1.json", 1.2), noisy("2.json", 3.0)
    assert [line[-2:] for table in comparison.tables(near, before) for line in table.lines] == [["1.20x", ""]]
    assert [line[-2:] for table in comparison.tables(far, before) for line in table.lines] == [["3.00x", "faster"]]


def test_rows_without_a_ratio_are_compared_by_their_times(tmp_path: Path) -> None:
    before = report.load(write(tmp_path / "0.json", entry("torch.compile", [4e-3] * 3)))
    now = report.load(write(tmp_path / "1.json", entry("torch.compile", [1e-3] * 3), entry("eager", [1.0], case="C9")))
    (table,) = comparison.tables(now, before)
    assert table.lines == [["C2 b1 bf16 NHWC", "torch.compile", "4.00 ms", "1.00 ms", "4.00x", "faster"]]
    assert comparison.differences(now, before) == ["1 row only in the run now"]
    alone = report.load(write(tmp_path / "2.json", entry("eager", [1.0], case="C7")))
    with pytest.raises(report.ReportError, match="no row in common"):
        list(comparison.tables(alone, before))


def test_the_gate_names_what_is_too_slow_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _run(tmp_path / "run.json", ratios={"C2": 1.5, "C3": 0.9, "C4": 0.8999})
    assert report.main([str(path), "--no-files"]) == 0
    assert report.main([str(path), "--no-files", "--fail-below", "0.8"]) == 0
    assert capsys.readouterr().err == ""
    assert report.main([str(path), "--no-files", "--fail-below", "0.9"]) == report.TOO_SLOW
    assert capsys.readouterr().err == "too slow: upsample_add, forward, C4: 0.8999x eager (wanted: 0.9x)\n"
    assert report.main([str(path), "--no-files", "--fail-below", "1"]) == report.TOO_SLOW
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " upsample_add, forward, C4",
        " upsample_add, forward, C3",
    ]


def test_the_gate_against_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = _run(tmp_path / "older.json", ratios={"C2": 2.0, "C3": 0.5})
    newer = _run(tmp_path / "newer.json", ratios={"C2": 1.8, "C3": 0.5})
    command = [str(newer), "--no-files", "--compare", str(older), "--fail-below"]
    assert report.main([*command, "0.85"]) == 0  # C3 is slower than eager, as it was
    assert report.main([*command, "0.95"]) == report.TOO_SLOW
    printed = capsys.readouterr()
    assert printed.err == "too slow: upsample_add, forward, C2: 0.90x its speed before (wanted: 0.95x)\n"
    assert f"Change since {older}" in printed.out and "0.90x   slower" in printed.out


def test_a_gate_that_can_judge_nothing_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.json", entry("eager", [1e-3]), entry("torch.compile", [1e-3], [1e-3]))
    assert report.main([str(path), "--no-files", "--fail-below", "0.5"]) == 1
    assert "no row of fpn_kernels can be judged" in capsys.readouterr().err
    for wrong in ("0", "-1", "nan", "fast"):
        with pytest.raises(SystemExit):
            report.main([str(path), f"--fail-below={wrong}"])


def test_the_page_and_the_picture_are_written_beside_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")
    image = pytest.importorskip("PIL.Image", reason="the picture is read with Pillow")
    path = write(
        tmp_path / "run.json",
        ceiling("bandwidth", "copy", 10**8, [1e-3]),
        ceiling("flops bf16", "matrix product", 10**12, [1.0]),
        *(
            row
            for operator, case in (("upsample_add", "C2"), ("upsample_add", "C3"), ("neck", "C2..C5"))
            for row in (
                entry("eager", [1e-3, 1.1e-3], operator=operator, case=case),
                entry("fpn_kernels", [5e-4, 6e-4], [1e-3, 1.1e-3], operator=operator, case=case),
                entry("somebody's", [9e-4, 9e-4], [1e-3, 1.1e-3], operator=operator, case=case, direction="backward"),
            )
        ),
    )
    assert report.main([str(path)]) == 0
    assert "run.md" in capsys.readouterr().err
    page = (tmp_path / "run.md").read_text()
    assert report.to_markdown(report.load(path)) in page and "(run.png)" in page
    with image.open(tmp_path / "run.png") as picture:
        assert picture.size[0] > 1500 and picture.size[1] > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
    # The library's bars and eager's line: drawn, not blank.
    assert {(0x00, 0x72, 0xB2), (0x8C, 0x8C, 0x8C), (0xCC, 0x79, 0xA7)} <= colours


def test_without_matplotlib_the_page_says_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = _run(tmp_path / "run.json", ratios={"C2": 2.0})
    (tmp_path / "run.png").write_bytes(b"an earlier run's")
    assert report.main([str(path)]) == 0
    assert "no picture: import of matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run.png").exists() and "run.png" not in (tmp_path / "run.md").read_text()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _run(tmp_path / "run.json", ratios={"C2": 2.0})
    (tmp_path / "run.md").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(path)]) == 1
    assert "cannot write beside" in capsys.readouterr().err
