"""The GPU run, on the CPU: whatever a part does, the rest goes on, in time, and is written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, prepare, records
from benchmarks.gpu import Run, main
from benchmarks.session import Outcome

ROOT = Path(__file__).resolve().parents[2]


def _run(tmp_path: Path, seconds: float, **parts: tuple[float, Any]) -> Run:
    run = Run(tmp_path / "run.json", tmp_path, seconds + 6, dry_run=True)
    run.parts = parts
    return run


def _parts(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in records.load(tmp_path / "run.json").document["parts"]}


def test_a_failing_part_does_not_stop_the_next(tmp_path: Path) -> None:
    seen: list[Any] = []

    def fails(deadline: float) -> str | None:
        raise ZeroDivisionError("on purpose")

    def next_part(deadline: float) -> str | None:
        seen.append(records.load(tmp_path / "run.json").document)  # what a kill at this moment would leave
        raise Outcome("skipped", "nothing to do")

    run = _run(tmp_path, 20, fails=(1, fails), next=(1, next_part), last=(1, lambda deadline: "done"))
    run.execute()
    parts = _parts(tmp_path)
    assert parts["fails"]["reason"] == "ZeroDivisionError: on purpose" and "Traceback" in parts["fails"]["output"]
    assert [part["status"] for part in parts.values()] == ["failed", "skipped", "ok"]
    assert run.document["complete"] and not seen[0]["complete"] and len(seen[0]["parts"]) == 1


def test_a_part_gets_its_share_of_what_is_left(tmp_path: Path) -> None:
    budgets: list[float] = []

    def spends(seconds: float) -> Callable[[float], str | None]:
        def action(deadline: float) -> None:
            budgets.append(deadline - time.monotonic())
            time.sleep(seconds)

        return action

    # The second overruns its two seconds; half a second is left for the last.
    shares = {
        "quick": (2, spends(0)),
        "overruns": (1, spends(2.5)),
        "next": (0.99, spends(1)),
        "last": (0.01, spends(0)),
    }
    run = _run(tmp_path, 4, **shares)
    run.execute()
    assert budgets[:2] == [pytest.approx(2, abs=0.3), pytest.approx(2, abs=0.3)]
    assert budgets[2:] == [pytest.approx(1.5, abs=0.4)]
    assert _parts(tmp_path)["last"]["reason"] == "no time left"


def test_a_build_that_fails_or_hangs_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = tmp_path / "setup.py"
    monkeypatch.setattr("benchmarks.runner.ROOT", tmp_path)
    run = _run(tmp_path, 20)
    run.parts = {"build": (1, run._build)}
    reasons = []
    for text, seconds in (("print('no such header'); raise SystemExit(3)", 60), ("import time; time.sleep(600)", 1)):
        setup.write_text(text)
        with pytest.raises(Outcome) as ended:
            run._build(time.monotonic() + seconds)
        reasons.append(str(ended.value))
    assert reasons == ["exit status 3; no such header", "not done within 1 s; no output"]


def test_the_counts_of_the_tests(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import os, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\ndef test_wrong(): assert 1 == 2\ndef test_crash(): os.abort()\n"
        "def test_absent(): pytest.skip('not here')\n"
    )
    run = _run(tmp_path, 60)
    with pytest.raises(Outcome, match="1 passed, 1 failed, 1 skipped, 1 crashed, 0 of 4 not run"):
        run.run_tests(str(suite), time.monotonic() + 120, 1)
    names = [failure["test"].rpartition("::")[2] for failure in run.document["tests"]["failures"]]
    assert names == ["test_wrong", "test_crash"]
    suite.write_text("")
    with pytest.raises(Outcome, match="no test was collected"):
        run.run_tests(str(suite), time.monotonic() + 120, 1)


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("========= ERROR SUMMARY: 0 errors", None),
        ("========= ERROR SUMMARY: 2 errors", "2 errors; launches: 3 ok"),
        ("========= Error: Device not supported", "memcheck gave no summary"),
    ],
)
def test_what_the_sanitizer_prints_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, message: str | None
) -> None:
    run = _run(tmp_path, 20)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    with pytest.raises(Outcome, match="not installed"):
        run._sanitizer(0.0)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(run, "suite", lambda *arguments, **options: ("3 ok", printed))
    if message is None:
        assert run._sanitizer(0.0) == "0 errors; launches: 3 ok"
    else:
        with pytest.raises(Outcome, match=message):
            run._sanitizer(0.0)


def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    file = tmp_path / "run.json"
    assert main(["--output", str(file), "--logs", str(tmp_path / "logs")]) == 2
    assert "no NVIDIA GPU that PyTorch can use" in capsys.readouterr().out and list(_parts(tmp_path)) == ["environment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tests,test"], "'test' is not a part; choose from environment, build, tests"),
        (["--minutes", "0"], "expected more than 0 minutes"),
        (["--output", "/proc/run.json"], "cannot write"),
    ],
)
def test_wrong_arguments_end_in_a_message(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path / "run.json"), "--logs", str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def _environment(**variables: str) -> dict[str, str]:
    """Without the variables of this pytest; with no compiler, so that the build leaves the library alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "FPN_"))}
    return {**kept, "PYTHON": sys.executable, "CXX": "/nonexistent/compiler", **variables}


def test_terminated_it_keeps_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "--output", str(file), "--logs", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--parts", "tests"], env=_environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        end = time.monotonic() + 90
        while not (tmp_path / "tests-0.log").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "interrupted" in out and "INCOMPLETE" in out
    found = records.load(file).document
    assert not found["complete"] and found["environment"]["torch"]


@pytest.mark.nightly
def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(
        f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@" || exit\n'
        'echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    sanitizer.chmod(0o755)
    words = "copy or upsample_add-forward-60x90-C2- or neck or sanitize or fpn_kernels-native"
    run = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "--output", "here/run.json", "-k", words],
        cwd=tmp_path,
        env=_environment(PATH=f"{tmp_path}:{os.environ['PATH']}", TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    document = records.load(tmp_path / "here" / "run.json").document
    parts = {part["name"]: part for part in document["parts"]}
    worked = [name for name, part in parts.items() if part["status"] == "ok"]
    assert [name for name in worked if name != "sanitizer"] == [
        *("environment", "tests", "ceilings", "users", "missed", "others"),
    ]
    assert "no C++ compiler" in parts["build"]["reason"]
    assert document["complete"] and document["dry_run"] and document["tests"]["skipped"] > 100
    assert {row["status"] for row in document["rows"]} == {"ok"} and len(document["rows"]) >= 6
    assert "DRY RUN" in run.stdout and "upsample_add, forward" in run.stdout


# ---- prepared


def test_a_prepared_cache_holds_in_another_folder(tmp_path: Path) -> None:
    entry = tmp_path / "triton" / "KEY"
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_bytes(b"code")
    paths = {name: f"/another/machine/KEY/{name}" for name in ("kernel.cubin", "kernel.ptx")}
    group = entry / "__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": paths}))
    assert prepare.environment(tmp_path) == {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    assert json.loads(group.read_text()) == {"child_paths": {"kernel.cubin": str(entry / "kernel.cubin")}}
    assert prepare.mismatch({}, tmp_path) == "prepared by an unknown version"
    (tmp_path / "prepared.json").write_text('{"triton": "3.6.0", "commit": "abc"}')
    assert prepare.mismatch({"triton": "3.6.0", "commit": "abc"}, tmp_path) is None
    assert prepare.mismatch({"triton": "3.7.0", "commit": "abc"}, tmp_path) == (
        "prepared for triton 3.6.0, this is 3.7.0"
    )


@pytest.mark.nightly
def test_preparing_compiles_what_a_launch_then_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert prepare.main(tmp_path, 400, small=True, folder=tmp_path / "gpu") == 0
    capsys.readouterr()
    found = sorted(path.name for path in (tmp_path / "gpu").rglob("*") if path.is_file())
    assert sum(name.endswith(".cubin") for name in found) > 10 and "prepared.json" in found
    assert prepare.main(tmp_path, 400, small=True, folder=tmp_path / "gpu") == 0
    assert sorted(path.name for path in (tmp_path / "gpu").rglob("*") if path.is_file()) == found
