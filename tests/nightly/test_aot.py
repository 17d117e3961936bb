"""A saved program and an AOTInductor package run where this library is not, or call its kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import exporting
import pytest
import torch
from exporting import UNEVEN, assert_pyramid, decomposed
from targets import record_calls

import fpn_kernels

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler on the CPU"),
    pytest.mark.filterwarnings(exporting.QUIET),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

# Runs where this library is not: PyTorch alone, with the import made impossible.
_ELSEWHERE = """
import sys
sys.modules["fpn_kernels"] = None
import torch

batches, saved, package = (f"{sys.argv[1]}/{name}" for name in ("batches.pt", "saved.pt2", "package.pt2"))
runs = [torch.export.load(saved).module(), torch._inductor.aoti_load_package(package)]
with torch.no_grad():
    pyramids = [[list(run(features)) for features in torch.load(batches)] for run in runs]
torch.save(pyramids, f"{sys.argv[1]}/pyramids.pt")
"""


def test_saved_and_aot_compiled_programs_run_without_the_library(tmp_path: Path) -> None:
    neck = exporting.neck()
    batches = [exporting.features(), exporting.features(3, sizes=UNEVEN)]
    program = decomposed(neck, (batches[0],), dynamic=True)
    torch.save(batches, tmp_path / "batches.pt")
    torch.export.save(program, tmp_path / "saved.pt2")
    # The wrapper of a program with symbolic sizes takes the C++ compiler ten seconds to optimise.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "package.pt2"), inductor_configs=options
    )
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved, compiled = torch.load(tmp_path / "pyramids.pt")
    for pyramids in (saved, compiled):
        for features, pyramid in zip(batches, pyramids, strict=True):
            assert_pyramid(pyramid, neck, features)


def test_an_aot_compiled_program_with_the_operators_calls_the_kernels(tmp_path: Path) -> None:
    top, lateral = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 8, 9)
    program = torch.export.export(exporting.Merge(), (top, lateral))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    run = torch._inductor.aoti_load_package(package)
    with record_calls() as calls:
        result = run(top, lateral)
    assert [operator for operator, _ in calls] == ["upsample_add"]
    assert torch.equal(result, fpn_kernels.upsample_add(top, lateral))
