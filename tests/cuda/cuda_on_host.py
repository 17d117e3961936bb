"""Builds the per-thread code of `csrc/cuda` for the host (`cuda_on_host.cpp`) and calls it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile

import torch
from building import ROOT, setup_module
from torch import Tensor

from fpn_kernels import resampling
from fpn_kernels.operators.layouts import allocate, result_format

SOURCE = pathlib.Path(__file__).with_name("cuda_on_host.cpp")

# The order of csrc/cuda/geometry.h.
PATHS = ("nhwc_doubled", "nhwc", "nchw_doubled", "nchw", "strided")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled code.  Its file name has a hash of the sources, so that all test processes share it."""
    build = setup_module()
    headers = sorted([*(ROOT / "csrc" / "cuda").glob("*.h"), *(ROOT / "csrc").glob("*.h")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [SOURCE, *headers]))
    key.update(torch.__version__.encode())
    folder = pathlib.Path(tempfile.gettempdir(), f"fpn_kernels_tests_{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"cuda_on_host_{key.hexdigest()[:16]}.so"
    if not built.is_file():
        partial = built.with_suffix(f".{os.getpid()}")
        include = build.torch_directory() / "include"
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-attributes"]
        flags += ["-Wno-maybe-uninitialized", "-ffp-contract=off", "-isystem", str(include)]
        subprocess.run([*build.compiler(), *flags, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(built)
    loaded = ctypes.CDLL(str(built))
    for name in ("merge_path", "merge_run", "adjoint_path", "adjoint_run"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name, count in (("wrong_division", 4), ("wrong_ranges", 3), ("ranges_are_exact", 3)):
        getattr(loaded, name).restype = ctypes.c_int64
        getattr(loaded, name).argtypes = [ctypes.c_int64] * count
    return loaded


class _Map(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "n", "c", "y", "x")),
    )


class _Result(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("n", "c", "y", "x")))


class Merge(ctypes.Structure):
    """`fpn::cuda::UpsampleAdd`."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("top", _Map),
        ("lateral", _Map),
        ("out", _Result),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("mode", ctypes.c_int64),
        ("gain", ctypes.c_double),
    )


class Adjoint(ctypes.Structure):
    """`fpn::cuda::UpsampleAddBackward`."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("grad", _Map),
        ("grad_top", _Result),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "top_height", "top_width", "mode")),
        ("gain", ctypes.c_double),
    )


def _map(tensor: Tensor) -> _Map:
    return _Map(tensor.data_ptr(), *tensor.shape[2:], *tensor.stride())


def poisoned(shape: tuple[int, ...], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A result full of NaN, so that a pixel that is not written is found."""
    return allocate(shape, like, memory_format).fill_(float("nan"))


def merge_call(top: Tensor, lateral: Tensor, out: Tensor, mode: str, gain: float) -> Merge:
    return Merge(
        _DTYPES.index(lateral.dtype), _map(top), _map(lateral), _Result(out.data_ptr(), *out.stride()),
        *lateral.shape[:2], resampling.MODES.index(mode), gain,
    )  # fmt: skip


def adjoint_call(grad: Tensor, grad_top: Tensor, mode: str, gain: float) -> Adjoint:
    return Adjoint(
        _DTYPES.index(grad.dtype), _map(grad), _Result(grad_top.data_ptr(), *grad_top.stride()),
        *grad.shape[:2], *grad_top.shape[2:], resampling.MODES.index(mode), gain,
    )  # fmt: skip


def upsample_add(
    top: Tensor, lateral: Tensor, mode: str = "nearest", gain: float = 1.0, path: str | None = None
) -> tuple[Tensor, str]:
    """The result, and the path that the call took."""
    out = poisoned(tuple(lateral.shape), lateral, result_format(lateral))
    call = merge_call(top, lateral, out, mode, gain)
    taken = library().merge_run(ctypes.byref(call), ctypes.c_int64(-1 if path is None else PATHS.index(path)))
    return out, PATHS[taken]


def upsample_add_backward(
    grad: Tensor, top_size: tuple[int, int], mode: str = "nearest", gain: float = 1.0, path: str | None = None
) -> tuple[Tensor, str]:
    """The gradient of the top, and the path that the call took."""
    grad_top = poisoned((*grad.shape[:2], *top_size), grad, result_format(grad))
    call = adjoint_call(grad, grad_top, mode, gain)
    taken = library().adjoint_run(ctypes.byref(call), ctypes.c_int64(-1 if path is None else PATHS.index(path)))
    return grad_top, PATHS[taken]
