"""Reads compiled GPU code with the tools that Triton brings: registers, memory, instructions."""

from __future__ import annotations

import functools
import pathlib
import subprocess

import pytest


@functools.cache
def cuobjdump() -> str:
    """The path of cuobjdump; skips the test where there is none."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    try:
        path = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:  # raised by Triton where a tool is missing
        pytest.skip(f"Triton came without cuobjdump: {error}")
    return str(path)


def dump(option: str, binary: pathlib.Path) -> str:
    """The output of cuobjdump for a cubin or an object file."""
    return subprocess.run([cuobjdump(), option, str(binary)], capture_output=True, text=True, check=True).stdout
