"""The benchmark suite: what its report says of known figures, and that the runner measures, checks and fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the suite under test is written with pytest-benchmark")

from benchmarks import cases, options, providers, report
from benchmarks.harness import WrongResultError, check

ROOT = Path(__file__).resolve().parent.parent


def _entry(provider: str, times: list[float], eager: list[float] | None = None, **extra: Any) -> dict[str, Any]:
    info = {
        "operator": "upsample_add",
        "direction": "forward",
        "case": "C2 b1 bf16 NHWC",
        "provider": provider,
        "dtype": "bf16",
        "bytes": 10**7,
        "flops": 10**6,
        "eager_times": eager or [],
        **extra,
    }
    return {"extra_info": info, "stats": {"data": times}}


def _ceiling(name: str, source: str, amount: float, times: list[float], **extra: Any) -> dict[str, Any]:
    return {"extra_info": {"ceiling": name, "source": source, "amount": amount, **extra}, "stats": {"data": times}}


def _write(path: Path, *entries: dict[str, Any], **document: Any) -> Path:
    path.write_text(json.dumps({"benchmarks": list(entries), "machine_info": {}, "datetime": "", **document}))
    return path


def _only_line(path: Path) -> list[str]:
    (table,) = report.tables(report.load(path))
    (line,) = table.lines
    return line


def test_ratio_is_the_median_over_pairs_of_rounds(tmp_path: Path) -> None:
    # Eager's own row was measured while the machine was twice as fast: the pairs, not that row, give the ratio.
    path = _write(
        tmp_path / "run.json",
        _entry("eager", [1e-3, 1e-3, 1e-3]),
        _entry("fpn_kernels", [1e-3, 1.1e-3, 1e-3], [2e-3, 2.2e-3, 4e-3], served_by={"upsample_add": "native"}),
    )
    assert _only_line(path) == ["C2 b1 bf16 NHWC", "-", "1.00 ms", "2.00x 1.00 ms ~", "native"]


def test_ratio_without_pairs_is_that_of_the_medians(tmp_path: Path) -> None:
    path = _write(tmp_path / "run.json", _entry("eager", [3e-3]), _entry("torch.compile", [1e-3, 2e-3, 9e-3]))
    (table,) = report.tables(report.load(path))
    assert table.lines[0][3].startswith("1.50x 2.00 ms")
    assert table.notes == ["torch.compile: 1.50x eager (geometric mean of 1 case, 1.50x to 1.50x)"]


def test_missing_eager_row_is_filled_from_the_pairs(tmp_path: Path) -> None:
    path = _write(tmp_path / "run.json", _entry("fpn_kernels", [1e-3] * 4, [5e-3] * 4))
    assert _only_line(path) == ["C2 b1 bf16 NHWC", "-", "5.00 ms", "5.00x 1.00 ms", "-"]


def test_missing_eager_row_and_pairs_give_no_ratio(tmp_path: Path) -> None:
    path = _write(tmp_path / "run.json", _entry("fpn_kernels", [1e-3] * 4))
    (table,) = report.tables(report.load(path))
    assert table.lines == [["C2 b1 bf16 NHWC", "-", "-", "1.00 ms", "-"]]
    assert table.notes == []


def test_floor_takes_the_best_ceiling_seen(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "run.json",
        _ceiling("bandwidth", "copy", 10**8, [1e-3, 2e-3]),  # 100 GB/s: 10 MB in 0.1 ms
        _ceiling("bandwidth", "copy", 10**8, [4e-3]),
        _ceiling("flops bf16", "matrix product", 10**6, [1.0]),  # 1 MFLOP/s, beside a convolution of 1 TFLOP/s
        _ceiling("flops bf16", "3x3 convolution", 10**12, [1.0]),
        _entry("eager", [4e-4, 4e-4]),
        _entry("fpn_kernels", [2e-4, 2e-4], [4e-4, 4e-4]),
    )
    assert _only_line(path) == ["C2 b1 bf16 NHWC", "100 us", "400 us 25%", "2.00x 200 us 50%", "-"]


def test_ceiling_of_another_dtype_does_not_count(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "run.json",
        _ceiling("bandwidth", "copy", 10**8, [1e-3]),
        _ceiling("flops fp32", "matrix product", 10**12, [1.0]),
        _entry("eager", [4e-4]),
    )
    assert _only_line(path)[1] == "-"


def test_device_time_gets_a_table_of_its_own(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "run.json",
        _entry("eager", [9e-4], device_times=[2e-4]),
        _entry("fpn_kernels", [9e-4], [9e-4], device_times=[5e-5], eager_device_times=[2e-4]),
    )
    device, caller = report.tables(report.load(path))
    assert device.title.endswith("(time on the device)") and device.lines[0][3].startswith("4.00x 50.0 us")
    assert caller.title.endswith("(time the caller waits)") and caller.lines[0][3].startswith("1.00x 900 us")


def test_grouping_and_mean_over_cases(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "run.json",
        *(
            entry
            for case, ratio in (("C2", 2.0), ("C3", 8.0))
            for entry in (
                _entry("eager", [1.0], case=case),
                _entry("fpn_kernels", [1.0], [ratio], case=case),
            )
        ),
        _entry("eager", [1.0], operator="neck", direction="forward+backward"),
    )
    upsample, neck = report.tables(report.load(path))
    assert [line[0] for line in upsample.lines] == ["C2", "C3"]
    assert upsample.notes == ["fpn_kernels: 4.00x eager (geometric mean of 2 cases, 2.00x to 8.00x)"]
    assert neck.title == "neck, forward+backward" and neck.header == ["case", "floor", "eager", "served by"]


def test_text_and_markdown_hold_the_same_cells(tmp_path: Path) -> None:
    results = report.load(
        _write(tmp_path / "run.json", _entry("eager", [1e-3] * 2), _entry("fpn_kernels", [5e-4] * 2, [1e-3] * 2))
    )
    for text in (report.to_text(results), report.to_markdown(results)):
        assert "2.00x 500 us" in text and "no ceilings" not in text.splitlines()[0]
    assert "| C2 b1 bf16 NHWC | - | 1.00 ms | 2.00x 500 us | - |" in report.to_markdown(results)


def test_a_contended_run_says_so(tmp_path: Path) -> None:
    machine = {"fpn_kernels": {"device_name": "a CPU", "backends": ["eager"], "contention": 0.4}}
    results = report.load(_write(tmp_path / "run.json", _entry("eager", [1.0]), machine_info=machine))
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


def test_options_know_their_aliases() -> None:
    assert options.dtypes("bf16,float32,bf16") == ("bf16", "fp32")
    assert options.layouts("channels_last,nchw") == ("NHWC", "NCHW")
    assert options.batches("1,8") == (1, 8)


def test_every_case_has_the_baseline_first_and_the_library() -> None:
    names = [p.name for p in providers.providers("cpu", "quick", ("eager",), compiled=True)]
    assert names == ["eager", "torch.compile", "fpn_kernels"]


def test_backends_that_are_here_become_providers_of_their_own() -> None:
    here = ("native", "triton", "eager")
    on_gpu = [p.name for p in providers.providers("cuda", "quick", here, compiled=False)]
    assert on_gpu == ["eager", "fpn_kernels", "fpn_kernels/native", "fpn_kernels/triton"]
    on_cpu = [p.name for p in providers.providers("cpu", "full", here, compiled=False)]
    assert on_cpu == ["eager", "fpn_kernels", "fpn_kernels/native", "fpn_kernels/eager"]  # never the interpreter


def test_selections_hold_what_they_promise() -> None:
    for preset in ("quick", "full"):
        for operator in ("upsample_add", "lateral_connection", "output_conv", "neck"):
            found = list(cases.select(preset, "cpu").cases(operator))
            assert {case.direction for case in found} == {cases.FORWARD, cases.TRAINING}
            assert {case.dtype for case in found} == {"fp32", "bf16"}
            assert {case.layout for case in found} == {"NCHW", "NHWC"}
    narrowed = cases.select("quick", "cuda", ("fp16",), ("NHWC",), (8,))
    assert {(c.dtype, c.layout, c.batch) for c in narrowed.cases("neck")} == {("fp16", "NHWC", 8)}


def test_check_lets_rounding_pass_and_nothing_else() -> None:
    want = torch.linspace(-4, 4, 64, dtype=torch.bfloat16)
    near = want + torch.tensor(0.015625, dtype=torch.bfloat16)
    check([near], [want], exact=False)
    with pytest.raises(WrongResultError, match="differs from eager in"):
        check([near], [want], exact=True)
    with pytest.raises(WrongResultError, match="is off by"):
        check([want * 1.05], [want], exact=False)
    with pytest.raises(WrongResultError, match="is off by nan"):
        check([want * float("nan")], [want], exact=False)
    with pytest.raises(WrongResultError, match="float32"):
        check([want.float()], [want], exact=False)
    with pytest.raises(WrongResultError, match="0 results where eager gives 1"):
        check([], [want], exact=False)


def _run(*arguments: str, module: str = "benchmarks", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    search = os.pathsep.join(filter(None, [environment.pop("path", ""), str(ROOT), inherited.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_runner_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "run.json"
    run = _run("--tiny", "--device=cpu", f"--output={file}")
    assert run.returncode == 0, run.stdout + run.stderr
    for title in ("upsample_add, forward", "output_conv, forward+backward", "neck, forward+backward"):
        assert title in run.stdout
    rows = report.load(file).rows
    assert {row.provider for row in rows} >= {"eager", "fpn_kernels"}
    for row in rows:
        assert row.bytes > 0 and row.flops > 0 and min(row.times["caller"]) > 0
        if row.provider == "fpn_kernels":
            assert row.served_by and len(row.eager_times["caller"]) == len(row.times["caller"])
    again = _run(str(file), "--markdown", module="benchmarks.report")
    assert again.returncode == 0 and "**neck, forward**" in again.stdout


def test_a_wrong_result_fails_the_run_and_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "broken_provider.py").write_text(
        "import fpn_kernels\n"
        "right = fpn_kernels.upsample_add\n"
        "fpn_kernels.upsample_add = lambda top, lateral, **options: right(top, lateral, **options) + 1e-6\n"
    )
    file = tmp_path / "run.json"
    plugin = ["--", "-p", "broken_provider"]
    run = _run("--tiny", "--device=cpu", "-k", "upsample_add", f"--output={file}", *plugin, path=str(tmp_path))
    assert run.returncode == 1
    assert "WrongResultError" in run.stdout and "differs from eager in" in run.stdout
    assert "some rows failed" in run.stderr
    timed = {(row.case, row.direction, row.provider) for row in report.load(file).rows}
    assert ("60x90 C2 b1 fp32 NCHW", "forward", "eager") in timed
    assert ("60x90 C2 b1 fp32 NCHW", "forward", "fpn_kernels") not in timed


def test_without_a_compiler_its_rows_are_skipped_with_the_reason(tmp_path: Path) -> None:
    narrow = ["--device=cpu", "--dtype=bf16", "--layout=NHWC", "-k", "upsample_add and forward-600x900 and compile"]
    run = _run(*narrow, f"--output={tmp_path / 'run.json'}", CXX="/nonexistent/compiler")
    assert run.returncode == 1  # nothing else was asked for
    assert "torch.compile needs a C++ compiler: none of /nonexistent/compiler is here" in run.stdout
    assert "nothing was measured" in run.stderr


def test_list_names_rows_and_measures_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    run = _run("--list", "--tiny", "--device=cpu", "--dtype=bf16", f"--output={file}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "bench_upsample_add[forward-60x90-C2-b1-bf16-NCHW-fpn_kernels]" in run.stdout
    assert "fp32" not in run.stdout and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype=int8",), "'int8' is not a dtype; choose from fp32, bf16, fp16"),
        (("--layout=NCWH",), "'NCWH' is not a layout; choose from NCHW, NHWC"),
        (("--batch=0",), "'0' is not a list of batch sizes"),
        (("--device=cuda:99", "--tiny"), "cuda:99 is not here"),
        (("--device=toaster", "--tiny"), "'toaster' is not a device"),
        (("--tiny", "--full"), "exclude each other"),
        (("--tiny", "--device=cpu", "-k", "nothing_like_it"), "no row matches"),
        (("--quick",), "unrecognized arguments: --quick"),
    ],
)
def test_wrong_options_end_in_a_message(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    run = _run(*arguments, f"--output={tmp_path / 'run.json'}")
    assert run.returncode not in (0, 1)
    assert message in run.stdout + run.stderr


def test_the_interpreter_is_never_timed(tmp_path: Path) -> None:
    run = _run("--tiny", "--device=cpu", f"--output={tmp_path / 'run.json'}", TRITON_INTERPRET="1")
    assert run.returncode == 4 and "TRITON_INTERPRET=1 is set" in run.stdout + run.stderr
