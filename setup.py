"""Builds the package, and csrc/ into one shared library.  Metadata and tools are in pyproject.toml.

The library is written against the LibTorch stable ABI, without Python, and loaded by torch.ops.load_library.  If it
cannot be built (no torch, no compiler, no ninja), the build prints the reason, and the package works without it.

CUDA kernels are built if there are nvcc and a torch with CUDA.  They need no GPU; with FORCE_CUDA=1, any torch.

Environment:
    CXX                    the compiler (default: the first of c++, g++, clang++)
    CXXFLAGS, LDFLAGS      additional flags of compiler and linker
    FORCE_CUDA             "1": CUDA kernels with any torch; "0": no CUDA kernels
    CUDA_HOME              the folder of bin/nvcc (default: nvcc on the PATH)
    TORCH_CUDA_ARCH_LIST   the GPUs to build for, e.g. "8.0;9.0a;10.0+PTX"
    NVCC_APPEND_FLAGS      additional flags, read by nvcc itself
    FPN_KERNELS_SANITIZE   "1": AddressSanitizer and UndefinedBehaviorSanitizer
    MAX_JOBS               the number of parallel compilers
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import re
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

# The library loads under this torch and later ones, whichever torch's headers it was built with.
TORCH_TARGET_VERSION = "0x020a000000000000"
OLDEST_TORCH = (2, 10)

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # No multiply-add contraction: all ISAs give the same bits, and source indices equal those of resampling.py.
    "-ffp-contract=off",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
SANITIZE_FLAGS = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"),
    "-Wno-maybe-uninitialized",  # unreliable with sanitizers, says GCC's manual
]

# The name of a source in csrc/ defines how it is compiled.  A plain name (`op.cpp`) is compiled once, for any CPU.  A
# kernel has a mark between two dots (`kernel.simd.cpp`) and is compiled once per ISA below, with these flags and with
# -DFPN_ISA=<isa>, the namespace of its functions.  The library selects the ISA at run time (csrc/isa.h).
AVX2_FLAGS = ["-mavx2", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
BF16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
AMX_FLAGS = [*BF16_FLAGS, "-mamx-tile", "-mamx-bf16"]
ISAS_BY_MARK: dict[str, dict[str, list[str]]] = {
    "simd": {"portable": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS},
    "fma": {"avx2": [*AVX2_FLAGS, "-mfma"], "avx512": AVX512_FLAGS},
    "avx512bf16": {"avx512bf16": BF16_FLAGS},
    "amx": {"amx": AMX_FLAGS},
}


# The supported GPUs.  The newest also as PTX, from which the driver compiles for later GPUs.
ARCHITECTURES = ("8.0", "9.0a", "10.0+PTX")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    # Like -ffp-contract=off above.  No cost: the kernels are memory-bound.
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-DUSE_CUDA",
]


def torch_directory() -> pathlib.Path | None:
    """The folder of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else pathlib.Path(spec.origin).parent


def torch_too_old() -> str | None:
    """The reason why torch is too old for the stable ABI version, or None; without importing it."""
    directory = torch_directory()
    version = None if directory is None else directory / "version.py"
    if version is None or not version.is_file():
        return None
    found = re.search(r"^__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", version.read_text(), re.MULTILINE)
    if found is None or (int(found[2]), int(found[3])) >= OLDEST_TORCH:
        return None
    return f"torch {found[1]} is older than {'.'.join(map(str, OLDEST_TORCH))}, which the library needs"


def compiler() -> list[str] | None:
    """The command line of the C++ compiler, or None."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def compiler_accepts(flags: list[str]) -> bool:
    """Whether the C++ compiler has the intrinsics that these flags enable."""
    command = compiler()
    if command is None:
        return False
    probe = [*command, *flags, "-fsyntax-only", "-x", "c++", "-include", "immintrin.h", "/dev/null"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def isas_by_mark() -> dict[str, dict[str, list[str]]]:
    """`ISAS_BY_MARK`, restricted to this processor's family and to the compiler (AMX: GCC 11, Clang 12)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {mark: {"portable": []} if mark == "simd" else {} for mark in ISAS_BY_MARK}
    return {**ISAS_BY_MARK, "amx": ISAS_BY_MARK["amx"] if compiler_accepts(AMX_FLAGS) else {}}


def ninja() -> list[str] | None:
    """The command line of ninja, or None."""
    found = shutil.which("ninja")
    if found:
        return [found]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def left_out() -> str | None:
    """The reason why the compiled library cannot be built, or None."""
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


def sanitizing() -> bool:
    return os.environ.get("FPN_KERNELS_SANITIZE") == "1"


def nvcc() -> str | None:
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(pathlib.Path(home, "bin"))) if home else shutil.which("nvcc")


def torch_has_cuda() -> bool:
    """Whether torch is a build with CUDA, without importing it."""
    directory = torch_directory()
    version = None if directory is None else directory / "version.py"
    return version is not None and re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE) is not None


def cuda_mismatch() -> str | None:
    """A warning if nvcc and torch are of different CUDA versions, or None.

    The library links nvcc's runtime statically, so both can coexist.  But each requires a driver of its major version.
    """
    tool, directory = nvcc(), torch_directory()
    if tool is None or directory is None:
        return None
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    ours = re.search(r"release (\d+)\.\d+", version)
    torchs = re.search(r"^cuda\b.*=\s*['\"](\d+)\.\d+", (directory / "version.py").read_text(), re.MULTILINE)
    if ours is None or torchs is None or ours[1] == torchs[1]:
        return None
    return (
        f"nvcc is of CUDA {ours[1]} and this torch of CUDA {torchs[1]}: the kernels for CUDA need a driver that has"
        f" CUDA {ours[1]}, else Triton or PyTorch is used; CUDA_HOME names an nvcc of CUDA {torchs[1]}"
    )


def cuda_left_out() -> str | None:
    """The reason why CUDA kernels are not built, or None."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return "FORCE_CUDA=0"
    if sanitizing():
        return "the sanitizers are for the CPU"
    if force != "1" and not torch_has_cuda():
        return "this torch has no CUDA (FORCE_CUDA=1 builds them nevertheless)"
    if nvcc() is None:
        home = os.environ.get("CUDA_HOME")
        return f"there is no nvcc in CUDA_HOME={home!r}" if home else "there is no nvcc"
    try:
        architectures()
    except ValueError as error:
        return str(error)
    return None


def architectures() -> list[str]:
    """The GPUs to build for: TORCH_CUDA_ARCH_LIST, or the supported GPUs that nvcc has.

    Raises:
        ValueError: there are none, or an entry of the list is not a compute capability.
    """
    named = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, \t"))
    if any(named):
        for name in named:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0a or 10.0+PTX, got {name!r}")
        return named
    tool = nvcc()
    assert tool is not None
    known = subprocess.run([tool, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    chosen = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '').rstrip('a+PTX')}" in known]
    if not chosen:
        raise ValueError(f"this nvcc knows none of {', '.join(ARCHITECTURES)}")
    return chosen


def architecture_flag(name: str) -> str:
    """nvcc's flag for one GPU."""
    number = name.replace(".", "").removesuffix("+PTX")
    code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def report(message: str) -> None:
    print(f"fpn_kernels: {message}", file=sys.stderr, flush=True)


class NinjaFile:
    """A build.ninja: one rule per language, one statement per object, one library."""

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
        # An unchanged file is not written, so that ninja has nothing to do.
        if not self.path.is_file() or self.path.read_text() != text:
            self.path.write_text(text)


def command_line(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def for_nvcc(flag: str) -> str:
    """A linker flag of the C++ compiler, for nvcc."""
    if flag.startswith("-Wl,"):
        return f"-Xlinker={flag.removeprefix('-Wl,')}"
    return flag if flag.startswith(("-L", "-l")) or not flag.startswith("-") else f"-Xcompiler={flag}"


def add_cuda(build: NinjaFile, include: list[str]) -> list[str]:
    """Add the CUDA kernels to a build; returns the linker's command."""
    tool = nvcc()
    assert tool is not None
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    flags = [*host, *NVCC_FLAGS, *map(architecture_flag, architectures()), *include]
    build.rule("nvcc", [command_line([tool, *flags]), "-MMD -MF $out.d -c $in -o $out"])
    for source in sorted(CSRC.glob("cuda/*.cu")):
        build.compile("nvcc", source, "", [])
    # nvcc finds its static runtime; a shared one would have to be found at run time.
    return [tool, *host, "-shared", "-cudart", "static"]


def write_ninja_file(directory: pathlib.Path, library: str, *, cuda: bool = False) -> None:
    """Write the build.ninja of csrc/ into a folder."""
    torch = torch_directory()
    cxx = compiler()
    assert torch is not None and cxx is not None
    sanitize = SANITIZE_FLAGS if sanitizing() else []
    include = ["-isystem", str(torch / "include")]
    isas = isas_by_mark()
    amx = ["-DFPN_AMX"] if isas["amx"] else []
    flags = [*COMMON_FLAGS, *amx, *sanitize, *include, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]

    build = NinjaFile(directory)
    build.rule("cxx", [command_line([*cxx, *flags]), "-MMD -MF $out.d $flags -c $in -o $out"])
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.parent.name == "cuda" and not cuda:
            continue
        mark = pathlib.Path(source.stem).suffix.removeprefix(".")
        if not mark:
            build.compile("cxx", source, "", [])
            continue
        for isa, isa_flags in isas[mark].items():
            build.compile("cxx", source, f".{isa}", [f"-DFPN_ISA={isa}", *isa_flags])
    linker = add_cuda(build, include) if cuda else [*cxx, "-shared", *sanitize]
    if cuda:
        libraries = [for_nvcc(flag) for flag in libraries]
    build.rule("link", [command_line(linker), "-o $out $in", command_line(libraries)], depfile=False)
    build.link(library)
    build.write()


class BuildNative(build_ext):
    """Runs ninja.  If a build fails, the package is built without the library."""

    def get_ext_filename(self, fullname: str) -> str:
        # One library for every Python, so there is no tag in its name.
        return str(pathlib.Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        # setuptools resets `inplace`, builds in another folder and copies the result.
        self.for_source_tree = bool(self.inplace)
        if self.editable_mode:
            # A folder that is kept, so that `build_ext --inplace` does not compile everything again.
            system = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{system}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        without_cuda = cuda_left_out()
        built = self._run_ninja(cuda=True) if without_cuda is None else None
        if built is None and without_cuda is None:
            without_cuda = "their build failed (see above)"
        if built is None:
            built = self._run_ninja(cuda=False)
        if built is None:
            # Removes the library of an earlier build of other sources.
            target.unlink(missing_ok=True)
            if self.for_source_tree:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            report("left out the compiled library: its build failed (see above)")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_bytes() != built.read_bytes():
            # Replaces the file, so that a process that has loaded the old one keeps it.
            temporary = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(built, temporary)
            temporary.replace(target)
        kinds = f"the CPU ({', '.join(isas_by_mark()['simd'])})"
        if without_cuda is None:
            report(f"built the compiled library for {kinds} and CUDA ({', '.join(architectures())})")
            if (mismatch := cuda_mismatch()) is not None:
                report(mismatch)
        else:
            report(f"built the compiled library for {kinds}")
            report(f"left out the kernels for CUDA: {without_cuda}")

    def _run_ninja(self, *, cuda: bool) -> pathlib.Path | None:
        """The library that ninja built, or None."""
        directory = pathlib.Path(self.build_temp, "native_cuda" if cuda else "native").resolve()
        directory.mkdir(parents=True, exist_ok=True)
        write_ninja_file(directory, "_native.so", cuda=cuda)
        command = [*(ninja() or []), "-C", str(directory), "--quiet"]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        return directory / "_native.so" if subprocess.run(command).returncode == 0 else None


class Wheel(bdist_wheel):
    """The library is independent of Python: py3, any ABI, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def main() -> None:
    """Run setuptools, with the compiled library if it can be built."""
    options: dict[str, Any] = {"cmdclass": {"build_ext": BuildNative, "bdist_wheel": Wheel}}
    reason = left_out() or torch_too_old()
    if reason is None:
        # Optional: an editable installation continues if the build failed.
        options["ext_modules"] = [Extension("fpn_kernels._native", sources=[], optional=True)]
    else:
        report(f"left out the compiled library: {reason}")
    setup(**options)


if __name__ == "__main__":
    main()
