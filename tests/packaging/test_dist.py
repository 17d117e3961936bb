"""The sdist holds all files that a build reads, and a wheel made from it computes in any folder."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import setuptools
from building import ROOT, setup_module
from targets import needs_library

from fpn_kernels import compatibility, native
from fpn_kernels.version import __version__

DISTRIBUTED = ("csrc", "fpn_kernels", "tests", "benchmarks", "examples", "docs")

# Runs in another process and folder, with only the installed package on the path.
SMOKE = """
import importlib.metadata, pathlib, sys
import torch
import fpn_kernels
from fpn_kernels import reference

place = pathlib.Path(sys.argv[1])
assert place in pathlib.Path(fpn_kernels.__file__).parents, fpn_kernels.__file__
assert importlib.metadata.version("fpn_kernels") == fpn_kernels.__version__
assert (pathlib.Path(fpn_kernels.__file__).parent / "py.typed").is_file()

torch.manual_seed(0)
network = fpn_kernels.FeaturePyramidNetwork([8, 16], 8, fpn_kernels.LastLevelMaxPool())
twin = reference.FeaturePyramidNetwork([8, 16], 8)
twin.load_state_dict(network.state_dict())
maps = {"0": torch.randn(1, 8, 15, 9, requires_grad=True), "1": torch.randn(1, 16, 8, 5)}
pyramid, expected = network(maps), twin(maps)
assert list(pyramid) == ["0", "1", "pool"]
for name, map_ in expected.items():
    torch.testing.assert_close(pyramid[name], map_)
(ours,) = torch.autograd.grad(pyramid["0"].square().sum(), maps["0"])
(theirs,) = torch.autograd.grad(expected["0"].square().sum(), maps["0"])
torch.testing.assert_close(ours, theirs)
print(fpn_kernels.explain("upsample_add", torch.ones(1, 2, 3, 3), torch.ones(1, 2, 6, 6)))
"""


def _run(*command: object, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # As from a shell: neither the tests' paths nor a forced backend of theirs.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FPN_KERNELS_")}
    run = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, "FORCE_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def _of_the_project() -> set[str]:
    """Paths of the distributed files: those that git tracks, or all files of an unpacked sdist."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *DISTRIBUTED]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
        return {path for path in listed if path and (ROOT / path).is_file()}
    found = (path for name in DISTRIBUTED for path in (ROOT / name).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in (".so", ".pyc")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built in a copy of the project: setuptools writes next to the sources."""
    tree = tmp_path_factory.mktemp("project")
    tops = [path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in (*tops, *_of_the_project()):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tree / path)
    # The files of an earlier build are not distributed.
    (tree / "fpn_kernels" / "_native.so").write_bytes(b"of an earlier build")
    (tree / "csrc" / "simd" / "tables.o").write_bytes(b"of an earlier build")
    (tree / "fpn_kernels" / "__pycache__").mkdir()
    (tree / "fpn_kernels" / "__pycache__" / "old.cpython-310.pyc").write_bytes(b"of an earlier run")
    _run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", "dist", cwd=tree)
    (made,) = (tree / "dist").iterdir()
    assert made.name == f"fpn_kernels-{__version__}.tar.gz"
    return made


@pytest.fixture
def unpacked(sdist: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path / f"fpn_kernels-{__version__}"


def _wheel(unpacked: pathlib.Path, **environment: str) -> pathlib.Path:
    _run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=unpacked, **environment)
    (made,) = (unpacked / "dist").glob("*.whl")
    return made


def _smoke(wheel: pathlib.Path, tmp_path: pathlib.Path) -> str:
    """The output of the installed package, in a folder of its own."""
    # In another process: a look for pip in this one would remove setuptools' distutils.
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        pytest.skip("an installation needs pip")
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    _run(*pip, "--quiet", "--no-index", "--no-deps", "--target", place, wheel, cwd=elsewhere)
    return _run(sys.executable, "-c", SMOKE, place, cwd=elsewhere, PYTHONPATH=str(place)).stdout


def test_the_sdist_holds_every_source_and_nothing_that_was_built(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path for path in _of_the_project() if not path.startswith("benchmarks/results/")}
    assert {"csrc/isa.cpp", "csrc/simd/vectors.h", "csrc/cuda/refusal.cu", "fpn_kernels/py.typed"} <= expected
    assert expected - names == set()
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CONTRIBUTING.md", "mkdocs.yml"} <= names
    assert [name for name in names if name.endswith((".so", ".o", ".pyc")) or "__pycache__" in name] == []


@pytest.mark.nightly
def test_a_wheel_made_from_the_sdist_without_a_compiler_computes(
    unpacked: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    wheel = _wheel(unpacked, CXX="no-such-compiler")
    assert wheel.name == f"fpn_kernels-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    modules = {path for path in _of_the_project() if path.startswith("fpn_kernels/")}
    assert names == modules, "the whole package, and no other file"
    said = _smoke(wheel, tmp_path)
    assert "native does not: the compiled library was not built" in said and "served by eager" in said


# Stands in for a compiler with the compiled library: tests/cpu/test_native_build.py tests the build.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -shared) linking=yes ;;
    -MF) shift; : > "$1" ;;
    -o) shift; target=$1 ;;
  esac
  shift
done
if [ "$linking" ]; then cp '{library}' "$target"; else : > "$target"; fi
"""


@pytest.mark.nightly
@needs_library
@pytest.mark.skipif(setup_module().left_out() is not None, reason=f"cannot build here: {setup_module().left_out()}")
def test_a_wheel_with_the_compiled_library_serves_by_it(unpacked: pathlib.Path, tmp_path: pathlib.Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(library=native.LIBRARY))
    compiler.chmod(0o755)
    wheel = _wheel(unpacked, CXX=str(compiler))
    assert wheel.name.startswith(f"fpn_kernels-{__version__}-py3-none-linux_"), "any Python, this platform"
    assert "fpn_kernels/_native.so" in zipfile.ZipFile(wheel).namelist()
    assert "served by native" in _smoke(wheel, tmp_path)


def _nvcc(directory: pathlib.Path, version: str) -> str:
    """A CUDA_HOME whose nvcc says that it is of this version, and knows every architecture."""
    tool = directory / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    tool.chmod(0o755)
    return str(directory)


@pytest.mark.parametrize(
    ("of_nvcc", "of_torch", "expected"),
    [
        ("13.0", "'12.8'", "nvcc is of CUDA 13 and this torch of CUDA 12: the kernels for CUDA need a driver that"),
        ("12.4", "'13.0'", "CUDA_HOME names an nvcc of CUDA 13"),
        ("12.4", "'12.8'", None),  # of one major version: a driver of 12 serves both
        ("13.0", "None", None),  # the CPU build of torch
    ],
)
def test_an_nvcc_of_another_major_version_is_reported(
    of_nvcc: str, of_torch: str, expected: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = setup_module()
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {of_torch}\n")
    monkeypatch.setattr(module, "torch_directory", lambda: tmp_path)
    monkeypatch.setenv("CUDA_HOME", _nvcc(tmp_path / "cuda", of_nvcc))
    said = module.cuda_mismatch()
    assert said is None if expected is None else expected in said


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.4.0", "torch 2.4.0 is older than 2.10, which the library needs"),
        ("2.9.1+cu128", "torch 2.9.1+cu128 is older than 2.10, which the library needs"),
        ("2.10.0a0+gitabc", None),
        ("3.0.0", None),
    ],
)
def test_a_build_with_an_old_torch_leaves_the_library_out(
    version: str, expected: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compilation would fail, in many lines, at the first header that the old torch does not have."""
    module = setup_module()
    (tmp_path / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\ncuda = None\n")
    monkeypatch.setattr(module, "torch_directory", lambda: tmp_path)
    assert module.torch_too_old() == expected
    seen: dict[str, object] = {}
    monkeypatch.setattr(module, "setup", seen.update)
    monkeypatch.setattr(module, "left_out", lambda: None)
    monkeypatch.setattr(module, "report", lambda message: seen.update(said=message))
    module.main()
    assert ("ext_modules" in seen) == (expected is None)
    assert seen.get("said") == (None if expected is None else f"left out the compiled library: {expected}")


def test_all_require_the_same_torch() -> None:
    module = setup_module()
    major, minor = module.OLDEST_TORCH
    assert (major, minor) == compatibility.OLDEST_TORCH
    assert f"0x{major:02x}{minor:02x}000000000000" == module.TORCH_TARGET_VERSION


@needs_library
@pytest.mark.skipif(setup_module().left_out() is not None, reason=f"cannot build here: {setup_module().left_out()}")
def test_a_build_with_an_nvcc_of_another_version_goes_on_and_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = setup_module()
    monkeypatch.setattr(module, "cuda_mismatch", lambda: "nvcc is of another CUDA")
    monkeypatch.setattr(module, "cuda_left_out", lambda: None)
    monkeypatch.setattr(module, "architectures", lambda: ["9.0a"])
    monkeypatch.setattr(module.BuildNative, "_run_ninja", lambda self, cuda: native.LIBRARY)
    command = module.BuildNative(setuptools.Distribution({"name": "fpn_kernels"}))
    command.build_lib, command.inplace, command.extensions = str(tmp_path), False, []
    command.build_extension(module.Extension("fpn_kernels._native", sources=[]))
    assert (tmp_path / "fpn_kernels" / "_native.so").is_file()
    said = capfd.readouterr().err
    assert "and CUDA (9.0a)" in said and "fpn_kernels: nvcc is of another CUDA" in said
