"""Reads compiled GPU code with the tools that Triton brings: registers, memory, instructions."""

from __future__ import annotations

import functools
import pathlib
import subprocess
from typing import Any

import pytest


@functools.cache
def cuobjdump() -> str:
    """The path of cuobjdump; skips the test where there is none."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    try:
        path = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:  # what Triton raises where a tool is missing
        pytest.skip(f"Triton came without cuobjdump: {error}")
    return str(path)


def is_gluon(variant: Any) -> bool:
    """Whether the kernel of a `compiled.Variant` is written in Gluon."""
    return hasattr(variant.kernel, "is_gluon") and bool(variant.kernel.is_gluon())


def source_of(variant: Any) -> Any:
    """What Triton compiles a `compiled.Variant` from."""
    from triton.compiler import ASTSource

    if is_gluon(variant):
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

    return ASTSource(variant.kernel, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs))


def compile_for(variant: Any, capability: int) -> Any:
    """A `compiled.Variant`, compiled for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source_of(variant), target=GPUTarget("cuda", capability, 32), options=dict(variant.options))


def dump(option: str, binary: pathlib.Path) -> str:
    """What cuobjdump prints about a cubin or an object file."""
    return subprocess.run([cuobjdump(), option, str(binary)], capture_output=True, text=True, check=True).stdout
