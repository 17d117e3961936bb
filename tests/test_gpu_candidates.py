"""The step that times each candidate kernel: by Triton up to the launch, on a GPU that is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from targets import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import no_launch
from benchmarks.gpu import candidates, rows
from benchmarks.providers import NotMeasuredError
from fpn_kernels.gpu import autotune

CPU = torch.device("cpu")
UNITS = {unit["operator"]: unit for unit in rows.candidates(tiny=True)}


def test_the_cases_are_those_with_a_table() -> None:
    assert set(UNITS) == {"lateral_connection", "output_conv", "upsample_add"}
    units = rows.candidates(tiny=False)
    assert len({unit["id"] for unit in units}) == len(units) == 16
    assert {unit["batch"] for unit in units} == {1, 8}


def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(NotMeasuredError, match="on a GPU alone"):
        candidates.measure(UNITS["upsample_add"], CPU)


class _Gpu:
    """Says that it is one, where the tensors are the CPU's."""

    type = "cuda"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("operator", UNITS)
def test_every_candidate_of_every_level_is_timed(
    operator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_answers", {})
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "_device_name", lambda tensor: "Some GPU")
    runs: list[int] = []

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        runs.append(len(runs))
        return 1.0 + len(runs)

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    real = candidates.workload
    monkeypatch.setattr(candidates, "workload", lambda case, device: real(case, CPU))
    with no_launch.triton_serves_the_cpu(keep=False):
        if operator == "output_conv":
            with pytest.raises(NotMeasuredError, match="one candidate alone"):  # of so few channels
                candidates.measure(UNITS[operator], _Gpu())  # type: ignore[arg-type]
            return
        result = candidates.measure(UNITS[operator], _Gpu())  # type: ignore[arg-type]
        assert {each["call"].split()[0] for each in result["measured"]} == {operator}
        assert sum(len(each["microseconds"]) for each in result["measured"]) == len(runs) >= 2
        assert all(each["default"] in each["microseconds"] for each in result["measured"])
        monkeypatch.setattr(autotune, "ENABLED", False)
        with pytest.raises(NotMeasuredError, match="FPN_KERNELS_AUTOTUNE is not set"):
            candidates.measure(UNITS[operator], _Gpu())  # type: ignore[arg-type]
