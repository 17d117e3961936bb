"""The machine code of `csrc/cuda` for each supported GPU.  Needs nvcc, but no GPU."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
from building import ROOT, setup_module
from machine_code import dump

_BUILD = setup_module()

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(_BUILD.nvcc() is None, reason="there is no nvcc"),
    pytest.mark.skipif(_BUILD.torch_directory() is None, reason="torch's headers are not here"),
]

# Kernels per file: paths times dtypes; strided kernels count in 32 or 64 bits.
KERNELS = {"upsample_add": 40, "upsample_add_backward": 32}

# Loads and stores per thread of the dense paths: width in bits and number.
DENSE = {
    "NhwcDoubledMerge": ({"128": 5}, {"128": 4}),
    "NchwDoubledMerge": ({"128": 2, "64": 1}, {"128": 2}),
    "NhwcDoubledAdjoint": ({"128": 4}, {"128": 1}),
    "NchwDoubledAdjoint": ({"128": 4}, {"128": 1}),
}


def _accesses(code: str, instruction: str) -> dict[str, int]:
    """Global accesses of a kernel, by width in bits."""
    counts: dict[str, int] = {}
    for access in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        width = next((part for part in access.split(".") if part in ("64", "128", "U16", "U8")), "32")
        counts[width] = counts.get(width, 0) + 1
    return counts


@pytest.mark.parametrize("architecture", _BUILD.ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_machine_code(source: str, architecture: str, tmp_path: pathlib.Path) -> None:
    built = tmp_path / f"{source}.o"
    include = ["-isystem", str(_BUILD.torch_directory() / "include")]
    command = [_BUILD.nvcc(), *_BUILD.NVCC_FLAGS, _BUILD.architecture_flag(architecture), *include]
    run = subprocess.run(
        [*command, "-c", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(built)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    usage = re.findall(r"Function (\w+):\n\s*(.*)", dump("-res-usage", built))
    assert len(usage) == KERNELS[source]
    for name, line in usage:
        assert re.search(r"\bSTACK:0\b.*\bLOCAL:0\b", line), (name, line)
    kernels = dump("--dump-sass", built).split("Function : ")[1:]
    assert len(kernels) == KERNELS[source]
    seen = set()
    for kernel in kernels:
        name, code = kernel.split("\n", 1)
        assert not re.search(r"\b(?:LDL|STL)\b", code), f"spills: {name}"
        loads, stores = _accesses(code, "LDG"), _accesses(code, "STG")
        body = next((body for body in DENSE if body in name), None)
        if body is not None:
            seen.add(body)
            assert (loads, stores) == DENSE[body], name
        elif re.search(r"Nhwc(?:Merge|Adjoint)", name):
            assert set(loads) == set(stores) == {"128"}, (name, loads, stores)
        elif "NchwMerge" in name:
            # The others gather coarse pixels one by one, or are the last, partial access.
            assert loads["128"] == stores["128"] == 1, (name, loads, stores)
    assert seen == {body for body in DENSE if body.endswith("Adjoint") == source.endswith("backward")}
