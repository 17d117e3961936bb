"""The build of csrc/: variants, parts that are left out, and messages."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from building import ROOT, setup_module

SOURCES = ("csrc", "fpn_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the sources, without earlier build outputs."""
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
        # CUDA kernels have tests of their own and compile slowly.
        env={**os.environ, "FORCE_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def _build(tree: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return _setup(tree, "build_ext", "--build-lib", "lib", "--build-temp", "temp", **environment)


needs_tools = pytest.mark.skipif(
    setup_module().left_out() is not None, reason=f"cannot build here: {setup_module().left_out()}"
)


def _leave_nothing_to_compile(tree: pathlib.Path) -> None:
    """Empty all sources except one; the library is not loaded."""
    for source in (tree / "csrc").rglob("*.cpp"):
        if source.stem != "isa":
            source.write_text("")


@pytest.mark.nightly
@needs_tools
def test_a_build_computes_under_any_torch_and_a_second_one_has_nothing_to_do(tree: pathlib.Path) -> None:
    """With CUDA kernels if there is nvcc: no CUDA library is linked, so a CPU build of torch loads it."""
    cuda = setup_module().nvcc() is not None
    # Without optimization: the build is tested, not the code.
    flags = {"CXXFLAGS": "-O0 -Werror", "NVCC_APPEND_FLAGS": "-O0"}
    flags |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"} if cuda else {}
    run = _build(tree, **flags)
    assert run.returncode == 0, run.stderr
    assert "built the compiled library for the CPU" in run.stderr
    assert ("and CUDA (8.0)" in run.stderr) == cuda
    library = tree / "lib" / "fpn_kernels" / "_native.so"
    objects = {path: path.stat().st_mtime_ns for path in [library, *tree.glob("temp/**/*.o")]}
    assert len(objects) > 5
    assert _build(tree, **flags).returncode == 0
    assert objects == {path: path.stat().st_mtime_ns for path in objects}
    code = (
        "import sys, torch, fpn_kernels\n"
        "with fpn_kernels.use_backend('native'):\n"
        "    print(fpn_kernels.upsample_add(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 6, 6)).sum().item())\n"
        "for name in ('upsample_add', 'upsample_add_backward'):\n"
        "    print(torch._C._dispatch_has_kernel_for_dispatch_key(f'fpn_kernels_native::{name}', 'CUDA'))\n"
        "if sys.argv[1:]:\n"
        "    print(torch.ops.fpn_kernels_native.cuda_refusal(99))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *(["cuda"] if cuda else [])],
        cwd=ROOT,
        env={**os.environ, "FPN_KERNELS_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = run.stdout.splitlines()
    assert lines[:3] == ["144.0", str(cuda), str(cuda)], run.stderr
    assert not cuda or lines[3], "a missing device is refused with the driver's message"
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
    assert "aoti_torch" in symbols or "torch_" in symbols
    assert not [line for line in symbols.splitlines() if "_ZN2at" in line or "_ZN3c10" in line or " Py" in line]
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needed and "cuda" not in needed


@pytest.mark.nightly
@needs_tools
@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in the source tree"])
def test_a_source_that_does_not_compile_is_left_out(tree: pathlib.Path, in_place: bool) -> None:
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text("#error broken on purpose\n" if source.stem == "isa" else "")
    stale = (tree if in_place else tree / "lib") / "fpn_kernels" / "_native.so"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_bytes(b"of an earlier build")
    arguments = ["--inplace"] if in_place else ["--build-lib", "lib"]
    run = _setup(tree, "build_ext", *arguments, "--build-temp", "temp", CXXFLAGS="-O0", MAX_JOBS="2")
    assert run.returncode == 0, run.stderr
    assert "left out the compiled library: its build failed" in run.stderr
    assert "broken on purpose" in run.stdout + run.stderr
    assert not stale.exists(), "a library of other sources"


@needs_tools
def test_the_name_of_a_source_decides_how_it_is_compiled(tmp_path: pathlib.Path) -> None:
    module = setup_module()
    module.write_ninja_file(tmp_path, "_native.so")
    objects = re.findall(r"^build objects/(\S+): cxx", (tmp_path / "build.ninja").read_text(), re.MULTILINE)
    variants = module.isas_by_mark()
    for source in (ROOT / "csrc").rglob("*.cpp"):
        name = source.relative_to(ROOT / "csrc").with_suffix("")
        if name.parts[0] == "cuda":
            assert f"{name}.o" not in objects
        elif name.suffix:
            found = {path for path in objects if path.startswith(f"{name}.")}
            assert found == {f"{name}.{isa}.o" for isa in variants[name.suffix[1:]]}
        else:
            assert f"{name}.o" in objects
    assert "upsample_add/kernel.simd.portable.o" in objects


@needs_tools
@pytest.mark.parametrize("knows", [False, True], ids=["an old compiler", "a new compiler"])
def test_amx_is_left_out_where_the_compiler_does_not_know_it(
    knows: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_module()
    if not setup.isas_by_mark()["avx512bf16"]:
        pytest.skip("this is no x86-64")
    wrapper = tmp_path / "compiler"
    refusal = "" if knows else 'case "$*" in *-mamx*) echo unknown option >&2; exit 1;; esac\n'
    wrapper.write_text(f'#!/bin/sh\n{refusal}exec {shlex.join(setup.compiler())} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    setup.write_ninja_file(tmp_path, "_native.so")
    text = (tmp_path / "build.ninja").read_text()
    assert ("-DFPN_AMX" in text) == ("output_conv/amx_kernel.amx.amx.o" in text) == knows


@pytest.mark.nightly
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
    module = setup_module()
    for name in ("torch_directory", "compiler", "ninja"):
        monkeypatch.setattr(module, name, lambda name=name: None if name == missing else ["present"])
    monkeypatch.setattr(sys, "platform", "linux")
    assert module.left_out() is not None and reason in module.left_out()
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on Linux only" in module.left_out()


def test_kernels_for_cuda_that_are_left_out_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = setup_module()

    def reason(**environment: str) -> str | None:
        with monkeypatch.context() as patch:
            for name, value in {"FORCE_CUDA": "1", **environment}.items():
                patch.setenv(name, value)
            left_out: str | None = module.cuda_left_out()
            return left_out

    assert reason(FORCE_CUDA="0") == "FORCE_CUDA=0"
    assert reason(FPN_KERNELS_SANITIZE="1") == "the sanitizers are for the CPU"
    home = {"CUDA_HOME": str(tmp_path)}
    assert reason(**home) == f"there is no nvcc in CUDA_HOME='{tmp_path}'"
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho sm_50\n")
    nvcc.chmod(0o755)
    assert "this nvcc knows none of 8.0, 9.0a" in (reason(**home) or "")
    expected = "TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0a or 10.0+PTX, got 'Hopper'"
    assert reason(**home, TORCH_CUDA_ARCH_LIST="8.0;Hopper") == expected
    assert reason(**home, TORCH_CUDA_ARCH_LIST="8.6 9.0a+PTX") is None


def test_a_torch_without_cuda_gets_no_kernels_unless_forced(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = setup_module()
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.delenv("FPN_KERNELS_SANITIZE", raising=False)
    monkeypatch.setattr(module, "torch_directory", lambda: tmp_path)
    monkeypatch.setattr(module, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(module, "architectures", lambda: ["8.0"])
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert "this torch has no CUDA" in module.cuda_left_out()
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert module.cuda_left_out() is None
    monkeypatch.delenv("FORCE_CUDA")
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    assert module.cuda_left_out() is None


@pytest.mark.nightly
@needs_tools
def test_a_build_whose_kernels_for_cuda_fail_goes_on_without_them(tree: pathlib.Path) -> None:
    tools = tree / "cuda" / "bin"
    tools.mkdir(parents=True)
    (tools / "nvcc").write_text("#!/bin/sh\necho nvcc is broken on purpose >&2\nexit 1\n")
    (tools / "nvcc").chmod(0o755)
    _leave_nothing_to_compile(tree)
    run = _build(
        tree, FORCE_CUDA="1", CUDA_HOME=str(tools.parent), TORCH_CUDA_ARCH_LIST="9.0a", CXXFLAGS="-O0", MAX_JOBS="2"
    )
    assert run.returncode == 0, run.stderr
    assert "broken on purpose" in run.stdout + run.stderr
    assert "left out the kernels for CUDA: their build failed" in run.stderr
    assert (tree / "lib" / "fpn_kernels" / "_native.so").is_file()


@pytest.mark.nightly
@needs_tools
def test_what_an_editable_installation_built_is_not_built_again(tree: pathlib.Path) -> None:
    """As in `make build` after an editable installation; calls pip's hook, to install nothing."""
    _leave_nothing_to_compile(tree)
    flags = {"FORCE_CUDA": "0", "CXXFLAGS": "-O0"}
    hook = "from setuptools.build_meta import build_editable; build_editable('.')"
    subprocess.run([sys.executable, "-c", hook], cwd=tree, env={**os.environ, **flags}, check=True, timeout=280)
    assert (tree / "fpn_kernels" / "_native.so").is_file()

    def built() -> dict[pathlib.Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tree / "build").rglob("*.o")}

    before = built()
    again = _setup(tree, "build_ext", "--inplace", **flags)
    assert again.returncode == 0, again.stderr
    assert len(before) > 10 and built() == before
