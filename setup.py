"""Builds the package, and csrc/ into one shared library.  Metadata and tools are in pyproject.toml.

The library knows no Python: it is written against the LibTorch stable ABI and loaded by torch.ops.load_library.
What cannot be built here (no torch, no compiler, no ninja) is left out, with the reason in the build's output, and
the package works without it.

Environment:
    CXX                    the compiler (default: the first of c++, g++, clang++)
    CXXFLAGS, LDFLAGS      added to its command lines
    FPN_KERNELS_SANITIZE   "1": AddressSanitizer and UndefinedBehaviorSanitizer
    MAX_JOBS               how many compilers at once
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# The library runs under this torch and every later one, whichever torch's headers it was built with.
TORCH_TARGET_VERSION = "0x020a000000000000"

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # Every level of the kernels gives the same bits, and the source indices are those of resampling.py: no product
    # and sum may be fused into one rounding.
    "-ffp-contract=off",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
SANITIZE_FLAGS = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"),
    "-Wno-maybe-uninitialized",  # which GCC itself calls unreliable together with sanitizers
]

AVX2_FLAGS = ["-mavx2", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# A file named *_kernel.cpp is compiled once a level, and the CPU's own is chosen at run time.
LEVELS: dict[str, list[str]] = {"portable": []}
# A file with one of these endings is compiled for these instructions alone, and left out on other processors.
FLAGS_BY_ENDING: dict[str, list[str] | None] = {"_avx512": None, "_avx512bf16": None}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS.update(avx2=AVX2_FLAGS, avx512=AVX512_FLAGS)
    FLAGS_BY_ENDING.update(_avx512=AVX512_FLAGS, _avx512bf16=[*AVX512_FLAGS, "-mavx512bf16"])


def torch_directory() -> pathlib.Path | None:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else pathlib.Path(spec.origin).parent


def compiler() -> list[str] | None:
    """The command line of the C++ compiler, or None."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def ninja() -> list[str] | None:
    """The command line of ninja, or None."""
    found = shutil.which("ninja")
    if found:
        return [found]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def left_out() -> str | None:
    """Why the compiled library cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    if torch_directory() is None:
        return "torch is not importable while building (use `pip install --no-build-isolation .`)"
    if compiler() is None:
        return (
            f"there is no C++ compiler (CXX={os.environ['CXX']!r})"
            if os.environ.get("CXX")
            else ("there is no C++ compiler (c++, g++ or clang++)")
        )
    if ninja() is None:
        return "there is no ninja"
    return None


def report(message: str) -> None:
    print(f"fpn_kernels: {message}", file=sys.stderr, flush=True)


class NinjaFile:
    """A build.ninja: one rule a language, one statement an object, one library."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.path = directory / "build.ninja"
        self.lines = [f"builddir = {self._escape(directory)}"]
        self.objects: list[str] = []

    @staticmethod
    def _escape(value: object) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(self, name: str, command: list[str], *, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: pathlib.Path, suffix: str, flags: list[str]) -> None:
        relative = source.relative_to(CSRC)
        target = self._escape(pathlib.Path("objects") / relative.with_name(f"{relative.stem}{suffix}.o"))
        self.lines += [f"build {target}: {rule} {self._escape(source)}", f"  flags = {shlex.join(flags)}"]
        self.objects.append(target)

    def link(self, library: str) -> None:
        self.lines += [f"build {library}: link {' '.join(self.objects)}", f"default {library}", ""]

    def write(self) -> None:
        text = "\n".join(self.lines)
        # Left alone where nothing changed, so that ninja has nothing to do.
        if not self.path.is_file() or self.path.read_text() != text:
            self.path.write_text(text)


def write_ninja_file(directory: pathlib.Path, library: str) -> None:
    """The build of csrc/ in a directory.  Kernels for CUDA (csrc/cuda/*.cu) will be a second rule here."""
    torch = torch_directory()
    cxx = compiler()
    assert torch is not None and cxx is not None
    sanitize = SANITIZE_FLAGS if os.environ.get("FPN_KERNELS_SANITIZE") == "1" else []
    flags = [*COMMON_FLAGS, *sanitize, "-isystem", str(torch / "include")]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link = ["-shared", *sanitize, f"-L{torch / 'lib'}", "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]

    def command(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    build = NinjaFile(directory)
    build.rule("cxx", [command([*cxx, *flags]), "-MMD -MF $out.d $flags -c $in -o $out"])
    build.rule("link", [command(cxx), "-o $out $in", command(link)], depfile=False)
    for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]):
        ending = next((ending for ending in FLAGS_BY_ENDING if source.stem.endswith(ending)), None)
        if source.stem.endswith("_kernel"):
            for level, level_flags in LEVELS.items():
                build.compile("cxx", source, f"_{level}", [f"-DFPN_LEVEL={level}", *level_flags])
        elif ending is None:
            build.compile("cxx", source, "", [])
        elif (own_flags := FLAGS_BY_ENDING[ending]) is not None:
            build.compile("cxx", source, "", own_flags)
    build.link(library)
    build.write()


class BuildNative(build_ext):
    """Runs ninja; what fails to build is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        # One library for every Python: no tag in its name.
        return str(pathlib.Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        directory = pathlib.Path(self.build_temp, "native").resolve()
        directory.mkdir(parents=True, exist_ok=True)
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        write_ninja_file(directory, "_native.so")
        command = [*(ninja() or []), "-C", str(directory), "--quiet"]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            # A library of an earlier build would not be the one of these sources.
            target.unlink(missing_ok=True)
            report("left out the compiled library: its build failed (see above)")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        built = directory / "_native.so"
        if not target.is_file() or target.read_bytes() != built.read_bytes():
            # A new file under the old name: a process that has the old one loaded keeps it.
            temporary = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(built, temporary)
            temporary.replace(target)
        report(f"built the compiled library for the CPU ({', '.join(LEVELS)})")


class Wheel(bdist_wheel):
    """The library asks nothing of the Python it runs under: py3, any ABI, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def main() -> None:
    """Runs setuptools, with the compiled library where it can be built."""
    options: dict[str, Any] = {"cmdclass": {"build_ext": BuildNative, "bdist_wheel": Wheel}}
    reason = left_out()
    if reason is None:
        # Optional: an editable installation goes on where the build failed.
        options["ext_modules"] = [Extension("fpn_kernels._native", sources=[], optional=True)]
    else:
        report(f"left out the compiled library: {reason}")
    setup(**options)


if __name__ == "__main__":
    main()
