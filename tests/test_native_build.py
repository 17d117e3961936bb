"""Building csrc/: what is built, what is left out, and what is said about it."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import types
import zipfile

import pytest

pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools >= 77")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "fpn_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def _setup_module() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of what a build reads, without what an earlier one left."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.is_file():
            shutil.copy(source, copy / name)
    return copy


def _setup(tree: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def _build(tree: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return _setup(tree, "build_ext", "--build-lib", "lib", "--build-temp", "temp", **environment)


needs_tools = pytest.mark.skipif(
    _setup_module().left_out() is not None, reason=f"cannot build here: {_setup_module().left_out()}"
)


@needs_tools
def test_a_build_computes_and_a_second_one_has_nothing_to_do(tree: pathlib.Path) -> None:
    # Unoptimised: the build is under test here, not the code.
    run = _build(tree, CXXFLAGS="-O0 -Werror")
    assert run.returncode == 0, run.stderr
    assert "built the compiled library for the CPU" in run.stderr
    library = tree / "lib" / "fpn_kernels" / "_native.so"
    objects = {path: path.stat().st_mtime_ns for path in [library, *tree.glob("temp/**/*.o")]}
    assert len(objects) > 5
    assert _build(tree, CXXFLAGS="-O0 -Werror").returncode == 0
    assert objects == {path: path.stat().st_mtime_ns for path in objects}
    code = (
        "import torch, fpn_kernels\n"
        "with fpn_kernels.use_backend('native'):\n"
        "    out = fpn_kernels.upsample_add(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 6, 6))\n"
        "    print(out.sum().item())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "FPN_KERNELS_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.startswith("144.0"), run.stderr
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
    assert "aoti_torch" in symbols or "torch_" in symbols
    assert not [line for line in symbols.splitlines() if "_ZN2at" in line or "_ZN3c10" in line or " Py" in line]


@needs_tools
def test_a_source_that_does_not_compile_is_left_out(tree: pathlib.Path) -> None:
    (tree / "csrc" / "library.cpp").write_text("#error broken on purpose\n")
    stale = tree / "lib" / "fpn_kernels" / "_native.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    run = _build(tree, CXXFLAGS="-O0", MAX_JOBS="2")
    assert run.returncode == 0, run.stderr
    assert "left out the compiled library: its build failed" in run.stderr
    assert "broken on purpose" in run.stdout + run.stderr
    assert not stale.exists(), "a library of other sources"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler (CXX='no-such-compiler')"),
        ({"CXX": "", "PATH": "/nonexistent"}, "there is no C++ compiler (c++, g++ or clang++)"),
    ],
    ids=["CXX", "PATH"],
)
def test_without_a_compiler_the_package_is_pure(environment: dict[str, str], reason: str, tree: pathlib.Path) -> None:
    run = _setup(tree, "bdist_wheel", "--dist-dir", "dist", **environment)
    assert run.returncode == 0, run.stderr
    assert f"left out the compiled library: {reason}" in run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fpn_kernels/functional.py" in names and not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("torch_directory", "torch is not importable while building"), ("ninja", "there is no ninja")],
)
def test_what_else_is_missing_is_named(missing: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _setup_module()
    for name in ("torch_directory", "compiler", "ninja"):
        monkeypatch.setattr(module, name, lambda name=name: None if name == missing else ["present"])
    monkeypatch.setattr(sys, "platform", "linux")
    assert module.left_out() is not None and reason in module.left_out()
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on Linux only" in module.left_out()
