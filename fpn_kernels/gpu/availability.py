"""Whether Triton works on this machine, and the reasons against a call that several kernels share.

Importing this file imports no Triton; `unavailable` imports it last, where nothing else is missing.
"""

from __future__ import annotations

import functools
import glob
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig

import torch
from torch import Tensor

from fpn_kernels import compatibility

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (3, 6)
_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")

# Up to this side, a float32 estimate of the first fine pixel that reads a coarse one is off by less than half a pixel,
# as `indexing.first_reader` requires: at 2**20, five roundings of 2**-24 add up to 0.31.
MAX_SIDE = 2**20

# Read when the library is imported, because Triton decides for good whether a kernel is interpreted when it is
# decorated.  The spellings are those Triton accepts.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


@functools.cache
def _triton_version() -> str | None:
    """Triton's version by its package metadata, "" where there is none; None where nothing is named `triton`."""
    try:
        if importlib.util.find_spec("triton") is None:
            return None
    except (ImportError, ValueError):
        pass  # a stub in `sys.modules` without `__spec__`: `_import_error` shows what it lacks
    return next(filter(None, map(compatibility.version_of, _DISTRIBUTIONS)), "")


@functools.cache
def _import_error() -> str | None:
    """Why the kernels cannot be imported, or None.

    A folder or a stub may have Triton's name, another package may shadow it, and Triton itself may raise.
    """
    try:
        # Together they import all of Triton that the kernels use.
        for name in ("gpu.indexing", "operators.output_conv.kernels"):
            importlib.import_module(f"fpn_kernels.{name}")
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # another module may raise anything
        return f"the module triton of {_place_of_triton()} does not work: {type(error).__name__}: {error}"
    return f"Triton {version} is older than {_needed()}" if compatibility.older_than(_OLDEST, version) else None


def _place_of_triton() -> str:
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "sys.modules"
    return spec.origin or next(iter(spec.submodule_search_locations or ()), "an unknown place")


def _needed() -> str:
    return ".".join(map(str, _OLDEST))


@functools.cache
def _cannot_build() -> str | None:
    """Why Triton cannot compile the C module that launches its kernels, or None."""
    knobs = sys.modules.get("triton.knobs")
    if os.environ.get("CC") or (knobs is not None and knobs.build.impl is not None):
        return None
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    # Not by `pathlib`, which raises where a parent folder may not be read.
    if glob.glob(os.path.join(glob.escape(cache), "*", "cuda_utils*.so")):
        return None  # compiled before, on this machine or where the cache came from
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler to launch kernels: install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton asks
    include = sysconfig.get_path("include", scheme)
    if not os.path.isfile(os.path.join(include, "Python.h")):
        return f"Triton needs Python's headers to launch kernels: {include}/Python.h is not there (python3-dev has it)"
    return None


def unavailable() -> str | None:
    version = _triton_version()
    if version is None:
        return "Triton is not installed"
    if compatibility.older_than(_OLDEST, version):
        return f"Triton {version} is older than {_needed()}"
    if not INTERPRETED:
        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA (and TRITON_INTERPRET is not set)"
        if not torch.cuda.is_available():
            return "no CUDA device (and TRITON_INTERPRET is not set)"
    # Imported last: a program that only runs on a CPU does not wait for it.
    return _import_error() or (None if INTERPRETED else _cannot_build())


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _capability_refusal(index: int | None, least: int) -> str | None:
    major, minor = capability(index)
    return None if major >= least else f"compute capability {major}.{minor} is below {least}.0"


def tensor_refusal(tensor: Tensor) -> str | None:
    if tensor.dtype not in _DTYPES:
        return f"{tensor.dtype} is none of float16, bfloat16, float32"
    if INTERPRETED:
        # The interpreter would compute a CUDA tensor on the host, through two copies.
        return None if tensor.device.type == "cpu" else f"TRITON_INTERPRET serves CPU tensors, not {tensor.device}"
    if tensor.device.type != "cuda":
        return f"serves CUDA tensors, not {tensor.device.type}"
    return _capability_refusal(tensor.device.index, 8)


def side_refusal(*sides: int) -> str | None:
    longest = max(sides)
    return None if longest <= MAX_SIDE else f"a side of {longest} pixels is above {MAX_SIDE}"


def rows_refusal(channels: int, height: int) -> str | None:
    rows = channels * height
    return None if rows < 2**30 else f"{rows} image rows: the kernels count the rows of an image in int32"


def pixels_refusal(height: int, width: int) -> str | None:
    few = height * width < 2**30
    return None if few else "a map of 2**30 pixels or more: the kernel counts the pixels of a map in int32"


def copies_in_bulk(tensor: Tensor) -> bool:
    """Whether the chip copies a descriptor's boxes (TMA); otherwise threads load them by pointers."""
    return not tensor.is_cuda or capability(tensor.device.index)[0] >= 9


def overlap_refusal(tensor: Tensor) -> str | None:
    """Why launches cannot overlap, or None; the interpreter runs them one after the other, with the same results."""
    return _capability_refusal(tensor.device.index, 9) if tensor.is_cuda else None


def interpreter_only(tensor: Tensor) -> str | None:
    """Why a kernel that serves by default on every GPU does not serve CPU tensors."""
    return None if tensor.is_cuda else "the interpreter is for checking kernels"


def unmeasured(tensor: Tensor) -> str | None:
    """Why a kernel that was measured only in 16 bits on compute capability 9.0 is opt-in for this tensor."""
    if not tensor.is_cuda:
        return interpreter_only(tensor)
    major, minor = capability(tensor.device.index)
    if major != 9:
        return f"only measured on compute capability 9.0; this is {major}.{minor}"
    return "only measured in 16 bits" if tensor.dtype == torch.float32 else None
