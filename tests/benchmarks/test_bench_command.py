"""`python -m benchmarks`, end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from targets import INTERPRETED

from benchmarks import records

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the benchmarks refuse to time the interpreter")


def _run(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    search = os.pathsep.join(filter(None, [path, str(ROOT), inherited.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.nightly
def test_a_run_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "run.json"
    run = _run("--tiny", "--device=cpu", f"--output={file}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert " left\n" in run.stdout and "neck, forward+backward" in run.stdout
    assert "**neck, forward**" in file.with_suffix(".md").read_text()
    rows = records.load(file).rows
    assert {row.provider for row in rows} >= {"eager", "fpn_kernels"}
    assert all(row.served_by and row.ratio("caller") for row in rows if row.provider == "fpn_kernels")


def test_a_wrong_result_fails_the_run_and_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "broken_provider.py").write_text(
        "import fpn_kernels\n"
        "right = fpn_kernels.upsample_add\n"
        "fpn_kernels.upsample_add = lambda top, lateral, **options: right(top, lateral, **options) + 1e-6\n"
    )
    file, words = tmp_path / "run.json", "upsample_add-forward-60x90-C2-b1"
    plugin = ["--", "-p", "broken_provider"]
    run = _run("--tiny", "--device=cpu", "-k", words, f"--output={file}", *plugin, path=str(tmp_path))
    assert run.returncode == 1 and "differs from eager in" in run.stdout and "1 failed" in run.stderr
    assert [row.provider for row in records.load(file).rows] == ["eager"]


def test_candidates_are_timed_against_the_library(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from benchmarks.cases import FORWARD, TINY, Case, Spot\n"
        "from benchmarks.providers import Candidate, NotMeasuredError\n"
        "from fpn_kernels import reference\n"
        "def refuses(*inputs): raise NotMeasuredError('not for this device')\n"
        "CASES = [Case('upsample_add', FORWARD, Spot(TINY, 2), 1, 'fp32', 'NHWC')]\n"
        "CANDIDATES = [Candidate('eager', CASES, reference.upsample_add), Candidate('refusing', CASES, refuses)]\n"
    )
    file = tmp_path / "run.json"
    run = _run("--candidates=mine", "--device=cpu", f"--output={file}", path=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "x what serves" in run.stdout and "not measured: not for this device" in run.stdout


def test_list_names_rows_and_measures_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    run = _run("--list", "--tiny", "--device=cpu", "--dtype=bf16", f"--output={file}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "upsample_add-forward-60x90-C2-b1-bf16-NCHW-fpn_kernels\n" in run.stdout and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype=int8",), "'int8' is not a dtype; choose from fp32, bf16, fp16"),
        (("--batch=0",), "'0' is not a list of batch sizes"),
        (("--device=cuda:99", "--tiny"), "cuda:99 is not here"),
        (("--device=toaster", "--tiny"), "'toaster' is not a device"),
        (("--tiny", "--full"), "not allowed with argument"),
        (("--tiny", "--device=cpu", "-k", "nothing_like_it"), "no row matches"),
        (("--quick",), "unrecognized arguments: --quick"),
    ],
)
def test_wrong_options_end_in_a_message(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    run = _run(*arguments, f"--output={tmp_path / 'run.json'}")
    assert run.returncode not in (0, 1) and message in run.stdout + run.stderr
    assert not (tmp_path / "run.json").exists()


def test_the_interpreter_is_never_timed(tmp_path: Path) -> None:
    run = _run("--tiny", "--device=cpu", f"--output={tmp_path / 'run.json'}", TRITON_INTERPRET="1")
    assert run.returncode == 4 and "TRITON_INTERPRET=1 is set" in run.stdout + run.stderr
