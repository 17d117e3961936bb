"""The compiled library: finds, checks and loads it, and says why where that fails.

`csrc/` is built into one shared library in the folder of this package.  It registers its kernels as
``torch.ops.fpn_kernels_native.*`` through the LibTorch stable ABI.  Nothing is loaded before the first use; the first
error is kept, for `python -m fpn_kernels` to show.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpn_kernels import library_file
from fpn_kernels.resampling import MODES

# The variable names another build of it, such as one with sanitizers.
ENVIRONMENT_VARIABLE = "FPN_KERNELS_LIBRARY"
LIBRARY = pathlib.Path(os.environ.get(ENVIRONMENT_VARIABLE) or pathlib.Path(__file__).resolve().parent / "_native.so")

_CURE = "`make build`, or `pip install --no-build-isolation .`, builds it"

# The number of each mode in the library.
MODE_NUMBERS = {mode: number for number, mode in enumerate(MODES)}
# The kernels that the package calls: a library without one of them is of another version.
_KERNELS: list[str] = []


def kernel(name: str) -> Callable[[], Callable[..., Any]]:
    """Declare a kernel of the library, before it is loaded; returns a function that looks it up."""
    _KERNELS.append(name)

    def look_up() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(torch.ops.fpn_kernels_native, name).default
        return found

    return look_up


@functools.cache
def load_error() -> str | None:
    """Loads the library; why it cannot be used, or None."""
    try:
        if not LIBRARY.is_file():
            return f"the compiled library was not built ({LIBRARY}); {_CURE}"
        fault = library_file.fault(LIBRARY)
        if fault is not None:
            return f"the compiled library would not load: {LIBRARY}: {fault}; {_CURE}"
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library would not load: {error}; {_CURE}"
    # A library from an earlier version of the sources loads, but would fail at its first call.
    missing = [name for name in _KERNELS if not hasattr(torch.ops.fpn_kernels_native, name)]
    if missing:
        return f"the compiled library {LIBRARY} is of another version: it has no {', '.join(missing)}; {_CURE}"
    return None


@functools.cache
def multiplies_by_tiles(dtype: torch.dtype) -> bool:
    """Whether the library multiplies maps of this dtype by AMX tiles on this CPU."""
    if dtype != torch.bfloat16 or load_error() is not None:
        return False
    return bool(torch.ops.fpn_kernels_native.multiplies_by_tiles.default())


@functools.cache
def cuda_refusal(device: int) -> str | None:
    """Why the library's kernels cannot run on a GPU, or None."""
    question = getattr(torch.ops.fpn_kernels_native, "cuda_refusal", None)
    if question is None:
        return "was built without kernels for CUDA"
    reason: str = question.default(device)
    return f"its kernels cannot run on cuda:{device}: {reason}" if reason else None


def device_refusal(tensor: Tensor) -> str | None:
    """Why a kernel for the CPU and CUDA does not serve the device of a tensor, or None."""
    if tensor.device.type == "cuda":
        return cuda_refusal(tensor.device.index)
    if tensor.device.type != "cpu":
        return f"was built for the CPU and CUDA, got a tensor on {tensor.device}"
    return None


def cpu_refusal(tensor: Tensor) -> str | None:
    """Why a kernel for the CPU alone does not serve the device of a tensor, or None."""
    if tensor.device.type != "cpu":
        return f"has it for the CPU alone, got a tensor on {tensor.device}"
    return None
