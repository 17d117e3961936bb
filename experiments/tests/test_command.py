"""`python -m experiments`: every candidate compiles for sm_90 without spills, and a wrong candidate is reported."""

from __future__ import annotations

import pytest
import torch
from maps import check, random_map, random_weight

from experiments import __main__ as command
from experiments.descriptors import launch as descriptors
from experiments.no_launch import no_launch
from experiments.stationary import launch as stationary
from fpn_kernels.gpu.launch import Link
from fpn_kernels.operators.lateral_connection.call import LateralConnection


@pytest.mark.parametrize("layout", command.FORMATS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((case.name, "bfloat16") for case in command.CASES), ("C2", "float32"), ("C2-gradient", "float32")],
)
def test_dry_run(name: str, dtype: str, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dry-run", "--case", name, "--layout", layout, "--dtype", dtype]) == 0
    _, served, *rows = capsys.readouterr().out.splitlines()
    assert "serves: " in served
    # TMA moves no map of NCHW whose rows are not multiples of 16 bytes; C5's weight does not fit into shared memory.
    is_odd = (name, layout) == ("C2-odd", "nchw")
    assert any("descriptors" in row for row in rows) == (not is_odd)
    assert any("stationary" in row for row in rows) == (not is_odd and dtype == "bfloat16" and name != "C5")


@pytest.mark.parametrize("layout", command.FORMATS)
def test_tensor_cores_and_bulk_copies(layout: str) -> None:
    with no_launch() as driver:
        for kernel, run in command.candidates(command.CASES[0].call(1, layout, torch.bfloat16, "cpu")):
            run()
            code = driver.launched[-1].instructions()
            assert "HGMMA." in code and "UTMALDG." in code, kernel


@pytest.mark.parametrize("layout", command.FORMATS)
def test_overlapping_launches_compile(layout: str) -> None:
    """`stationary` as a level of a pathway: launches overlap by programmatic dependent launch."""
    call = command.CASES[0].call(1, layout, torch.bfloat16, "cpu")
    operands = (call.feature, call.matrix(), call.bias, call.top, call.allocate())
    config = stationary.candidates(*operands)[0]
    with no_launch() as driver:
        stationary.plan(config, *operands, link=Link(follows=True, leads=True))(*operands, 1.0)
    assert "ACQBULK" in driver.launched[0].instructions()
    assert driver.launched[0].usage()[1] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.fixture
def call() -> LateralConnection:
    """A call that the interpreter computes in seconds."""
    feature, top = random_map((1, 16, 5, 9), torch.float16), random_map((1, 8, 3, 5), torch.float16)
    weight = random_weight(8, 16, torch.float16)[:, :, None, None]
    return LateralConnection(feature, weight, torch.randn(8).half(), top)


@pytest.mark.interpreter
@pytest.mark.parametrize("is_wrong", [False, True])
def test_timing(
    is_wrong: bool,
    call: LateralConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if is_wrong:
        monkeypatch.setattr(descriptors, "plan", lambda *_: lambda *arguments: arguments[4].zero_())
    monkeypatch.setattr("triton.testing.do_bench", lambda run, return_mode: 2.0)
    assert command.time_all([("small", call)]) == is_wrong
    _, served, *rows = capsys.readouterr().out.splitlines()
    assert "serves: " in served and rows
    assert all(" 1.00 " in row and row.endswith("WRONG") == is_wrong for row in rows)


@pytest.mark.interpreter
def test_exact(call: LateralConnection) -> None:
    operands = {name: getattr(call, name) for name in ("feature", "weight", "bias", "top")}
    check(command.exact(call).half(), operands, "nearest", 1.0)
