"""Faults of an installation: each ends in a working fallback, or in a message that names the cure."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import fpn_kernels
from fpn_kernels import compatibility, diagnostics, library_file, native
from fpn_kernels.gpu import availability

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILT = pytest.mark.skipif(not native.LIBRARY.is_file(), reason="the compiled library was not built")

# A merge through the public function, and the backend that served it.
SMOKE = (
    "import torch, fpn_kernels\n"
    "merged = fpn_kernels.upsample_add(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 6, 6))\n"
    "assert torch.equal(merged, torch.full((1, 2, 6, 6), 2.0))\n"
    "print(fpn_kernels.explain('upsample_add', torch.ones(1, 2, 3, 3), torch.ones(1, 2, 6, 6)))\n"
)


def _python(*arguments: str, cwd: pathlib.Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- the compiled library's file


def _elf(segments_end: int, sections_end: int) -> bytes:
    """The header of a library whose one segment and whose table of sections end there."""
    section = 64
    header = struct.pack(
        "<16s HHI QQQ I HHHHHH",
        *(b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, sections_end - section, 0, 64, 56, 1, section, 1, 0),
    )
    return header + struct.pack("<II QQQQQQ", 1, 5, 0x40, 0, 0, segments_end - 0x40, segments_end, 0x1000)


@pytest.mark.parametrize("size", [0, 3, 63, 64, 119, 120, 500, 999])
@pytest.mark.parametrize(("segments_end", "sections_end"), [(1000, 640), (640, 1000)])
def test_a_library_shorter_than_its_header_is_refused(
    segments_end: int, sections_end: int, size: int, tmp_path: pathlib.Path
) -> None:
    whole = _elf(segments_end, sections_end).ljust(1000, b"\0")
    path = tmp_path / "_native.so"
    path.write_bytes(whole)
    assert library_file.fault(path) is None
    path.write_bytes(whole[:size])
    assert str(library_file.fault(path)).startswith("it is cut short: ")


def test_a_file_that_is_no_library_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "_native.so"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "no shared library of 64-bit Linux" in str(library_file.fault(path))


@BUILT
def test_the_built_library_is_whole() -> None:
    assert library_file.fault(native.LIBRARY) is None


@BUILT
@pytest.mark.parametrize("share", [0.4])
def test_a_truncated_library_is_named_and_eager_serves(share: float, tmp_path: pathlib.Path) -> None:
    """Loaded, it would kill the process: the loader reads pages that the file does not have."""
    cut = tmp_path / "_native.so"
    content = native.LIBRARY.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    run = _python("-c", SMOKE, FPN_KERNELS_LIBRARY=str(cut), FPN_KERNELS_BACKEND="")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("upsample_add: served by eager")
    assert f"native does not: the compiled library would not load: {cut}: it is cut short" in run.stdout
    assert "`make build`" in run.stdout, "the cure"


def test_the_report_names_a_truncated_library(tmp_path: pathlib.Path) -> None:
    cut = tmp_path / "_native.so"
    cut.write_bytes(_elf(1000, 640))
    run = _python("-m", "fpn_kernels", FPN_KERNELS_LIBRARY=str(cut), FPN_KERNELS_BACKEND="")
    assert run.returncode == 0, run.stderr
    assert f"native   the compiled library would not load: {cut}: it is cut short: 120 bytes of 1,000" in run.stdout
    assert "output_conv: served by eager" in run.stdout


def test_a_library_that_cannot_be_read_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: pathlib.Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(native.library_file, "fault", refuses)
    monkeypatch.setattr(native, "LIBRARY", pathlib.Path(__file__))
    native.load_error.cache_clear()
    try:
        assert "would not load: [Errno 13] Permission denied" in str(native.load_error())
    finally:
        native.load_error.cache_clear()


def test_a_library_in_a_folder_that_may_not_be_entered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: pathlib.Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, "is_file", refuses)
    assert "would not load: [Errno 13] Permission denied" in str(native.load_error.__wrapped__())


@BUILT
def test_a_library_of_an_earlier_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_KERNELS", (*native._KERNELS, "of_tomorrow"))
    native.load_error.cache_clear()
    try:
        assert "is of another version: it has no of_tomorrow; `make build`" in str(native.load_error())
        assert fpn_kernels.available_backends()[-1] == "eager"
    finally:
        native.load_error.cache_clear()


# ---- torch and Triton


@pytest.mark.parametrize("version", ["2.4.0", "2.9.1+cu128", "1.13.1"])
def test_an_old_torch_is_named_with_the_one_that_is_needed(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs torch 2\.10 or later, and this is torch {version[:5]}"):
        compatibility.require_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.13.0+cpu", "3.0", "built here"])
def test_a_torch_that_is_new_enough_passes(version: str) -> None:
    compatibility.require_torch(version)


def test_importing_under_an_old_torch_raises_nothing_else() -> None:
    """Also where the old torch lacks what the library's own files import."""
    code = (
        "import torch\n"
        "torch.__version__ = '2.4.0'\n"
        "del torch.library, torch.compiler\n"
        "import sys; sys.modules['torch.library'] = None\n"
        "import fpn_kernels\n"
    )
    run = _python("-c", code)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fpn_kernels needs torch 2.10 or later, and this is torch 2.4.0"), run.stderr
    assert "pip install 'torch>=2.10'" in last


def test_the_oldest_torch_is_that_of_the_metadata() -> None:
    needed = ".".join(map(str, compatibility.OLDEST_TORCH))
    assert f'dependencies = ["torch>={needed}"]' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def bare(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A machine with a GPU and Triton, without C compilers on the PATH, and a cache of Triton's that is empty."""
    monkeypatch.setattr(availability, "_triton_version", lambda: "3.7.0")
    monkeypatch.setattr(availability, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(availability.sysconfig, "get_path", lambda name, scheme: str(tmp_path / "include"))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    monkeypatch.setattr(availability, "_import_error", lambda: None)
    availability._cannot_build.cache_clear()
    yield tmp_path
    availability._cannot_build.cache_clear()


def _with_gcc(place: pathlib.Path) -> None:
    (place / "bin").mkdir()
    (place / "bin" / "gcc").write_text("#!/bin/sh\n")
    (place / "bin" / "gcc").chmod(0o755)


def test_triton_without_a_c_compiler_is_passed_over_and_says_so(bare: pathlib.Path) -> None:
    """It would fail at its first launch, in the middle of a network."""
    assert "needs a C compiler to launch kernels: install gcc or clang, or set CC" in str(availability.unavailable())
    assert "triton" not in fpn_kernels.available_backends()


def test_triton_with_a_c_compiler_serves(bare: pathlib.Path) -> None:
    _with_gcc(bare)
    assert availability.unavailable() is None


def test_triton_without_the_headers_of_python_says_so(bare: pathlib.Path) -> None:
    _with_gcc(bare)
    (bare / "include" / "Python.h").unlink()
    assert f"{bare}/include/Python.h is not there" in str(availability.unavailable())


def test_triton_needs_no_compiler_where_it_has_compiled_before(bare: pathlib.Path) -> None:
    (bare / "cache" / "ABC").mkdir(parents=True)
    (bare / "cache" / "ABC" / "cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    assert availability.unavailable() is None


def test_a_compiler_in_cc_is_not_checked(bare: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/opt/some/compiler")
    assert availability.unavailable() is None


def test_a_folder_that_may_not_be_read_counts_as_missing(bare: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pathlib` asks of a folder that may not be entered by raising; root may enter all, hence a link to itself."""
    (bare / "loop").symlink_to(bare / "loop")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(bare / "loop" / "cache"))
    monkeypatch.setattr(availability.sysconfig, "get_path", lambda name, scheme: str(bare / "loop" / "include"))
    _with_gcc(bare)
    assert "Python.h is not there" in str(availability.unavailable())


# Takes an installed Triton out of sight.
_HIDDEN = "import torch; sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'triton'))]"
_SHADOW = "sys.path.insert(0, os.getcwd())"

# Each is Triton by its name alone: where it is, and how it gets there.
_STUBS = {
    "triton": f"{_HIDDEN}; {_SHADOW}; os.mkdir('triton')",
    "triton/__init__.py": f"{_HIDDEN}; {_SHADOW}; os.mkdir('triton'); open('triton/__init__.py', 'w').close()",
    "triton.py, which raises": f"{_SHADOW}; open('triton.py', 'w').write('1 / 0')",
    "triton.py, which has a version": f"{_SHADOW}; open('triton.py', 'w').write('__version__ = \"3.7.0\"')",
    "sys.modules, a stub": "sys.modules['triton'] = types.ModuleType('triton')",
    "sys.modules, a mock": "sys.modules['triton'] = unittest.mock.MagicMock()",
}


@pytest.mark.parametrize("what", _STUBS)
def test_a_stub_of_triton_is_named_and_the_others_serve(what: str, tmp_path: pathlib.Path) -> None:
    """Interpreted, so that nothing else is missing on a machine without a GPU."""
    code = (
        f"import os, sys, types, unittest.mock\n{_STUBS[what]}\n{SMOKE}"
        "assert 'triton' not in fpn_kernels.available_backends()\n"
        # What only Triton or eager serves.
        "print(fpn_kernels.explain('channel_sums', torch.ones(1, 2, 4, 4)))\n"
        "print(torch.ops.fpn_kernels.channel_sums(torch.ones(1, 2, 4, 4)))\n"
        "from fpn_kernels import diagnostics; print(diagnostics.report())\n"
        "fpn_kernels.use_backend('triton')\n"
    )
    run = _python("-c", code, cwd=tmp_path, TRITON_INTERPRET="1", FPN_KERNELS_BACKEND="")
    place = what.partition(",")[0]
    place = place if place == "sys.modules" else f"{tmp_path}/{place}"
    reason = f"the module triton of {place} does not work: "
    assert "channel_sums: served by eager\n  native does not: has no implementation" in run.stdout, run.stderr
    assert f"triton does not: {reason}" in run.stdout and f"  triton   {reason}" in run.stdout, run.stdout
    last = run.stderr.strip().splitlines()[-1]
    assert f"name: backend 'triton' is not available here: {reason}" in last, run.stderr


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.5.1", "Triton 3.5.1 is older than 3.6"), ("main", None), ("", None), ("3", None), ("4.0.0a0+git1", None)],
)
def test_a_version_that_is_no_number_is_not_too_old(
    version: str, reason: str | None, bare: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_gcc(bare)
    monkeypatch.setattr(availability, "_triton_version", lambda: version)
    assert availability.unavailable() == reason


@pytest.mark.parametrize("answer", [None, KeyError("Version"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")])
def test_metadata_that_cannot_be_read_are_none(answer: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str | None:
        if answer is not None:
            raise answer
        return None

    monkeypatch.setattr(compatibility.importlib.metadata, "version", version)
    assert compatibility.version_of("triton") is None
    assert availability._triton_version.__wrapped__() in ("", None)
    assert "triton       not installed" in diagnostics.report()


# ---- imported twice

FORGOTTEN = "for name in [n for n in sys.modules if n.partition('.')[0] == 'fpn_kernels']: del sys.modules[name]\n"


@pytest.mark.parametrize(
    "again",
    [
        FORGOTTEN + "import fpn_kernels\n",
        FORGOTTEN + "sys.path.insert(0, sys.argv[1])\nimport fpn_kernels\n",
        "importlib.reload(sys.modules['fpn_kernels.operators.operator'])\n",
    ],
    ids=["forgotten", "another copy", "reloaded"],
)
def test_imported_again_it_names_the_first_place(again: str, tmp_path: pathlib.Path) -> None:
    shutil.copytree(ROOT / "fpn_kernels", tmp_path / "fpn_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # The first import goes on serving.
    code = f"import importlib, sys\n{SMOKE}first = fpn_kernels\ntry:\n" + "".join(
        f"    {line}\n" for line in again.splitlines()
    )
    code += "except ImportError as error:\n    print('ERROR', error)\nelse:\n    raise SystemExit('imported')\n"
    code += "assert float(first.upsample_add(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2)).sum()) == 8\n"
    run = _python("-c", code, str(tmp_path), FPN_KERNELS_BACKEND="")
    assert run.returncode == 0, run.stderr
    assert f"ERROR fpn_kernels was imported before in this process, from {ROOT / 'fpn_kernels'}, and" in run.stdout
    assert "restart Python" in run.stdout, "the cure"


@pytest.mark.parametrize(
    "again",
    ["importlib.reload(fpn_kernels)\n", "del sys.modules['fpn_kernels']\nimport fpn_kernels\n"],
    ids=["reloaded", "forgotten by its first name"],
)
def test_its_first_file_alone_may_run_again(again: str) -> None:
    run = _python("-c", f"import importlib, sys\n{SMOKE}{again}{SMOKE}", FPN_KERNELS_BACKEND="")
    assert run.returncode == 0, run.stderr


# ---- a read-only installation

READ_ONLY = """
import errno, os, sys

def refuse(event, arguments):
    # As a read-only file system does; for every user, who may be root.
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if writes and str(path) != os.devnull and not str(path).startswith("/dev/"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

import torch
sys.addaudithook(refuse)
try:
    open(sys.argv[1] + "/probe", "w")
except OSError as error:
    assert error.errno == errno.EROFS
else:
    raise SystemExit("the hook does not refuse")
import fpn_kernels
assert fpn_kernels.__file__.startswith(sys.argv[1]), fpn_kernels.__file__
"""


def test_a_read_only_installation_computes(tmp_path: pathlib.Path) -> None:
    shutil.copytree(ROOT / "fpn_kernels", tmp_path / "fpn_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = READ_ONLY + SMOKE
    run = _python("-c", code, str(tmp_path), cwd=tmp_path, PYTHONPATH="", FPN_KERNELS_BACKEND="")
    assert run.returncode == 0, run.stderr
    assert "upsample_add: served by" in run.stdout
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_cache_on_a_read_only_disk_is_one_warning_and_no_failure(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = READ_ONLY + (
        "import warnings\n"
        "from fpn_kernels.gpu import autotune\n"
        "autotune._device_name = lambda tensor: 'Some GPU'\n"
        "autotune.milliseconds = lambda run: run() or 1.0\n"
        "runs = []\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for size in (1, 2, 1):\n"
        "        print(autotune.fastest('op', (size,), torch.empty(1), ['a', 'b'], 'b', runs.append))\n"
        "assert runs == ['a', 'b', 'a', 'b'], runs\n"
        "print([str(each.message) for each in caught])\n"
    )
    run = _python("-c", code, str(ROOT), FPN_KERNELS_AUTOTUNE="1", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("a\na\na\n")
    assert run.stdout.count("Read-only file system") == 1 and "it is ignored" in run.stdout


def test_this_torch_is_supported() -> None:
    compatibility.require_torch(torch.__version__)
