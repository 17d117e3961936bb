"""The GPU run itself, walked on the CPU: whatever a part of it does, the rest goes on, in time, and is written down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import document
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.checks import StepFailed
from benchmarks.gpu.children import Child
from benchmarks.gpu.run import Options, Run, Step

ROOT = Path(__file__).resolve().parent.parent


def _environment(**variables: str) -> dict[str, str]:
    """Without what this pytest or its shell set for themselves; the build then has no compiler and leaves all alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "FPN_"))}
    return {**kept, "PYTHON": sys.executable, "CXX": "/nonexistent/compiler", **variables}


@pytest.fixture(autouse=True)
def _logs_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is told no folder for its logs makes one and leaves it, for whoever reads it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_dry_run_walks_every_step(tmp_path: Path) -> None:
    # A compute-sanitizer that runs what it is given and finds nothing.
    _script(
        tmp_path / "compute-sanitizer",
        '#!/bin/sh\ntool=$2\nwhile [ "$1" != "' + sys.executable + '" ]; do shift; done\n"$@" || exit\n'
        'if [ "$tool" = memcheck ]; then echo "========= ERROR SUMMARY: 0 errors"\n'
        'else echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"; fi\n',
    )
    rows = r"upsample_add forward 60x90 C2 |neck forward\+backward|smoke \w+ bf16"
    run = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "--output", "here/run.json", "--rows", rows],
        cwd=tmp_path,
        env=_environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = document.load(tmp_path / "here" / "run.json")
    steps = {step["name"]: step for step in found["steps"]}
    kernels = bool(found["environment"]["measured_backends"])  # none where the library is not built
    worked = ["environment", "smoke", "tests", "ceilings", "headline", "others", *(["sanitizer"] if kernels else [])]
    assert [name for name, step in steps.items() if step["status"] == "ok"] == worked
    assert "no C++ compiler" in steps["build"]["reason"] and steps["max-autotune"]["status"] == "skipped"
    assert found["complete"] and found["dry_run"] and found["environment"]["gpu"] is None
    assert len(found["smoke"]) >= 5 and {unit["status"] for unit in found["smoke"]} == {"ok"}
    assert {unit["operator"] for unit in found["smoke"]} >= {
        "upsample_add",
        "lateral_connection",
        "output_conv",
        "neck",
    }
    assert found["tests"]["collected"] == found["tests"]["skipped"] > 100
    assert {entry["limit"] for entry in found["ceilings"]} == {"bandwidth", "flops bf16"}
    assert len(found["rows"]) == 4 and {row["status"] for row in found["rows"]} == {"ok"}
    assert all(row["caller"]["own"] > 0 and row["caller"]["ratio"] > 0 and row["served_by"] for row in found["rows"])
    judged = [(entry["tool"], entry["errors"]) for entry in found["sanitizer"]]
    assert judged == ([("memcheck", 0), ("racecheck", 0)] if kernels else [])
    assert all(entry["ran"] == entry["of"] == 10 for entry in found["sanitizer"])
    assert "DRY RUN" in run.stdout and "upsample_add 60x90 C2 b1 bf16 NHWC" in run.stdout


def test_terminated_it_keeps_what_it_has_and_ends_its_children(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    command = [
        str(ROOT / "benchmarks" / "gpu.sh"),
        "--dry-run",
        "--output",
        str(file),
        "--logs",
        str(tmp_path / "logs"),
    ]
    process = subprocess.Popen(
        [*command, "--steps", "smoke"], env=_environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        _until(lambda: file.exists() and bool(document.load(file)["environment"]))
        _until(lambda: any(tmp_path.glob("logs/results-*")))
        (units,) = tmp_path.glob("logs/units-*")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1 and "interrupted" in out and "INCOMPLETE" in out
    found = document.load(file)
    assert not found["complete"] and found["environment"]["torch"]
    _until(lambda: not _running(str(units)), seconds=20)  # a killed process ends when the kernel gets to it


def _until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def _running(word: str) -> bool:
    """Whether a process has this among its arguments."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in entry.read_text():
                return True
        except OSError:
            continue
    return False


def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    file = tmp_path / "run.json"
    assert main(["--output", str(file), "--logs", str(tmp_path / "logs")]) == 2
    assert "no NVIDIA GPU that PyTorch can use" in capsys.readouterr().out
    assert [step["name"] for step in document.load(file)["steps"]] == ["environment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "smoke,smok"], "'smok' is not a step; choose from environment, build, smoke"),
        (["--minutes", "0"], "expected more than 0 minutes"),
        (["--rows", "("], "is not a regular expression"),
        (["--resume", "/nonexistent.json"], "cannot read /nonexistent.json"),
    ],
)
def test_wrong_arguments_end_in_a_message(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output", str(tmp_path / "run.json")])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


# --- steps and their time --------------------------------------------------------------------------------------------


def _run(tmp_path: Path, seconds: float, *steps: Step, **options: Any) -> tuple[Run, list[str]]:
    said: list[str] = []
    run = Run(Options(tmp_path / "run.json", tmp_path, seconds + 6, dry_run=True, **options), said.append)
    run.steps = steps
    return run, said


def _entries(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in document.load(tmp_path / "run.json")["steps"]}


def test_a_failing_step_does_not_stop_the_next(tmp_path: Path) -> None:
    def fails(deadline: float) -> str | None:
        raise ZeroDivisionError("on purpose")

    seen: list[Any] = []

    def next_step(deadline: float) -> str | None:
        seen.append(document.load(tmp_path / "run.json"))  # what a kill at this moment would leave
        return "done"

    run, said = _run(tmp_path, 20, Step("fails", fails, 0, 5), Step("next", next_step, 0, 5))
    assert run.execute()["complete"]
    entries = _entries(tmp_path)
    assert entries["fails"]["status"] == "failed" and entries["fails"]["reason"] == "ZeroDivisionError: on purpose"
    assert "on purpose" in entries["fails"]["output"] and entries["next"]["reason"] == "done"
    assert not seen[0]["complete"] and [step["name"] for step in seen[0]["steps"]] == ["fails"]
    assert any("ZeroDivisionError" in line for line in said)


def test_a_step_gets_what_is_left_less_what_later_ones_need(tmp_path: Path) -> None:
    budgets: dict[str, float] = {}

    def spends(name: str, seconds: float) -> Callable[[float], str | None]:
        def action(deadline: float) -> str | None:
            budgets[name] = deadline - time.monotonic()
            time.sleep(seconds)
            return None

        return action

    steps = [
        Step("capped", spends("capped", 0), 1, 1),
        Step("overruns", spends("overruns", 4), 1, 100),
        Step("squeezed", spends("squeezed", 0), 1, 100),
        Step("reserved", spends("reserved", 0), 5, 100),
    ]
    run, _ = _run(tmp_path, 9, *steps)
    run.execute()
    assert budgets["capped"] == pytest.approx(1, abs=0.5)
    assert budgets["overruns"] == pytest.approx(3, abs=0.5)  # 9 less what the two after it need
    # It took 4 s where it had 3: the next has nothing left, the last what was kept for it.
    assert "squeezed" not in budgets and budgets["reserved"] == pytest.approx(5, abs=0.5)


def test_too_little_time_for_all_is_shared(tmp_path: Path) -> None:
    budgets: list[float] = []

    def action(deadline: float) -> str | None:
        budgets.append(deadline - time.monotonic())
        return None

    run, _ = _run(tmp_path, 8, Step("first", action, 10, 100), Step("second", action, 30, 100))
    run.execute()
    assert budgets == [pytest.approx(2, abs=0.3), pytest.approx(8, abs=0.3)]  # the first left all of its part


def test_a_step_without_time_is_not_begun(tmp_path: Path) -> None:
    called: list[float] = []

    def action(deadline: float) -> str | None:
        called.append(deadline)
        return None

    run, _ = _run(tmp_path, 3, Step("early", action, 0, 100), Step("late", action, 3, 100))
    run.execute()
    entries = _entries(tmp_path)
    assert entries["early"]["status"] == "skipped" and entries["early"]["reason"] == "no time left"
    assert entries["late"]["status"] == "ok" and len(called) == 1


def test_a_hanging_child_is_killed_by_its_budget_with_all_that_it_started(tmp_path: Path) -> None:
    grandchild = "import time; open('alive', 'w').close(); time.sleep(600)"
    program = (
        f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    child = Child([sys.executable, "-c", program], tmp_path / "log", tmp_path)
    _until((tmp_path / "alive").exists)
    assert _running("open('alive', 'w')")
    began = time.monotonic()
    assert not child.wait(child.seconds() + 0.3)
    assert time.monotonic() - began < 5 and child.status() == -signal.SIGKILL
    assert child.tail() == "begun"
    _until(lambda: not _running("open('alive', 'w')"), 5)


def test_a_run_goes_on_with_an_earlier_one(tmp_path: Path) -> None:
    machine = {"gpu": None, "torch": "2.11.0", "triton": "3.6.0", "commit": "abc"}
    row = {"id": "a", "status": "ok"}
    earlier = document.empty(dry_run=True, date="2026-01-31T12:00:00", limit_seconds=480)
    earlier |= {"environment": machine, "rows": [row, {"id": "b", "status": "not measured"}], "smoke": [{"id": "s"}]}
    earlier |= {"tests": {"passed": 3}, "steps": [{"name": "headline", "status": "failed", "seconds": 1.0}]}
    run, _ = _run(tmp_path, 20, only=("headline", "tests"), earlier=earlier)
    run._go_on_with(earlier, machine)
    assert run.document["rows"] == [row] and run.document["smoke"] == [{"id": "s"}]
    assert run.document["tests"] == {}  # they run again
    begun: list[str] = []

    class Pool:
        def run(self, units: list[dict[str, Any]], deadline: float) -> None:
            begun.extend(unit["id"] for unit in units)

    run._pool = lambda finished, environment: Pool()  # type: ignore[assignment, return-value]
    run._units([{"id": "a"}, {"id": "b"}], time.monotonic() + 1, run.document["rows"])
    assert begun == ["b"] and run.pointless() is None

    other, _ = _run(tmp_path, 20, earlier=earlier)
    with pytest.raises(StepFailed, match="not the torch of the run to go on with: '2.13.0' here, '2.11.0' there"):
        other._go_on_with(earlier, {**machine, "torch": "2.13.0"})
    assert other.pointless() and other.document["rows"] == []


def test_the_build_fails_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _script(tmp_path / "c++", "#!/bin/sh\necho this compiler compiles nothing >&2\nexit 1\n")
    (tmp_path / "root").mkdir()
    _script(tmp_path / "root" / "setup.py", "import sys\nprint('no such header')\nsys.exit(3)\n")
    monkeypatch.setattr("benchmarks.gpu.run.ROOT", tmp_path / "root")
    monkeypatch.setenv("CXX", str(compiler))
    run, _ = _run(tmp_path, 30)
    run.steps = (Step("build", run._build, 0, 30),)
    run.execute()
    assert _entries(tmp_path)["build"]["status"] == "failed"
    assert _entries(tmp_path)["build"]["reason"] == "exit status 3; no such header"


def test_a_build_that_hangs_is_ended_by_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _script(tmp_path / "setup.py", "import time\nprint('compiling', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr("benchmarks.gpu.run.ROOT", tmp_path)
    run, _ = _run(tmp_path, 30)
    run.steps = (Step("build", run._build, 0, 2), Step("next", lambda deadline: None, 0, 1))
    run.execute()
    entries = _entries(tmp_path)
    assert entries["build"]["status"] == "failed" and entries["build"]["seconds"] < 8
    assert entries["build"]["reason"] == "not done within 2 s; compiling" and entries["next"]["status"] == "ok"
