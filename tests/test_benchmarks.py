"""The benchmark suite: its runner measures, checks and fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the suite under test is written with pytest-benchmark")

from benchmarks import cases, options, providers, report
from benchmarks.harness import WrongResultError, check

ROOT = Path(__file__).resolve().parent.parent


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
        for operator in ("upsample_add", "lateral_connection", "output_conv", "neck", "weighted_merge"):
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
    check([want * 1.02], [want], exact=False, depth=4)  # four merges in a row
    with pytest.raises(WrongResultError, match="allowed is 0.031 of it"):
        check([want * 1.05], [want], exact=False, depth=4)
    with pytest.raises(WrongResultError, match="is off by nan"):
        check([want * float("nan")], [want], exact=False)
    # A difference of two sums of a hundred each, which cancel.
    check([want * 1.05], [want], exact=False, sizes={0: 100.0})
    with pytest.raises(WrongResultError, match="is off by"):
        check([want, want * 1.05], [want, want], exact=False, sizes={0: 100.0})
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
    assert " left [" in run.stdout and "**neck, forward**" in file.with_suffix(".md").read_text()
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
