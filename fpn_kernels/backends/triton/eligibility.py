"""Why the Triton kernels cannot serve a call, stated once each.

Importing this file imports no Triton; `unavailable` does where nothing else is missing.
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
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels import compatibility
from fpn_kernels.backends.triton import geometry

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (3, 6)
_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")

# Up to here a float32 estimate of the first fine pixel that reads a coarse one is off by less than half a pixel, as
# `device.first_reader` needs: five roundings of 2**-24 each, at 2**20, come to 0.31.
LONGEST_SIDE = 2**20

# `descriptor_kernels.MOST_LEVELS`: P2 to P6.
MOST_LEVELS = 5

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
        for name in ("device", "output_conv"):
            importlib.import_module(f"{__package__}.{name}")
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # whatever a module of somebody else's raises
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
    """Why Triton could not compile the C module that launches its kernels; it would say so at the first launch."""
    knobs = sys.modules.get("triton.knobs")
    if os.environ.get("CC") or (knobs is not None and knobs.build.impl is not None):
        return None
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    # Not by `pathlib`, which raises where a folder above may not be read.
    if glob.glob(os.path.join(glob.escape(cache), "*", "cuda_utils*.so")):
        return None  # compiled before, here or where the cache came from
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
    # Imported no earlier: what only runs on a CPU does not wait for it.
    return _import_error() or (None if INTERPRETED else _cannot_build())


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _capability_refusal(index: int | None, least: int) -> str | None:
    major, minor = capability(index)
    return None if major >= least else f"compute capability {major}.{minor} is below {least}.0"


def _tensor_refusal(tensor: Tensor) -> str | None:
    if tensor.dtype not in _DTYPES:
        return f"{tensor.dtype} is none of float16, bfloat16, float32"
    if INTERPRETED:
        # The interpreter would compute a CUDA tensor on the host, through two copies.
        return None if tensor.device.type == "cpu" else f"TRITON_INTERPRET serves CPU tensors, not {tensor.device}"
    if tensor.device.type != "cuda":
        return f"serves CUDA tensors, not {tensor.device.type}"
    return _capability_refusal(tensor.device.index, 8)


def _side_refusal(*sides: int) -> str | None:
    longest = max(sides)
    return None if longest <= LONGEST_SIDE else f"a side of {longest} pixels is above {LONGEST_SIDE}"


def _rows_refusal(channels: int, height: int) -> str | None:
    rows = channels * height
    return None if rows < 2**30 else f"{rows} image rows: the kernels count the rows of an image in int32"


def _pixels_refusal(height: int, width: int) -> str | None:
    few = height * width < 2**30
    return None if few else "a map of 2**30 pixels or more: the kernel counts the pixels of a map in int32"


def upsample_add(top: Tensor, lateral: Tensor, mode: str, gain: float) -> str | None:
    return (
        _tensor_refusal(lateral)
        or _side_refusal(*top.shape[2:], *lateral.shape[2:])
        or _rows_refusal(lateral.shape[1], lateral.shape[2])
    )


def upsample_add_backward(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> str | None:
    return (
        _tensor_refusal(grad)
        or _side_refusal(*grad.shape[2:], *top_size)
        or _rows_refusal(grad.shape[1], max(grad.shape[2], top_size[0]))
    )


def merge_backward(grad: Tensor, top_size: tuple[int, int], own: Tensor | None, mode: str, gain: float) -> str | None:
    return upsample_add_backward(grad, top_size, mode, gain)


def channel_sums(source: Tensor) -> str | None:
    refusal = _tensor_refusal(source)
    if refusal is None and not source.is_contiguous(memory_format=torch.channels_last):
        refusal = "the kernel adds up dense NHWC maps"
    if refusal is None and source.shape[0] * source.shape[2] * source.shape[3] >= 2**30:
        refusal = "2**30 pixels or more: the kernel counts them in int32"
    return refusal


def weighted_merge(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> str | None:
    resized = [x for x in (second, third) if x is not None and x.shape != first.shape]
    if len(resized) > 1:
        return "two maps to be resized: the kernels resize one at most"
    top = resized[0] if resized else first
    return (
        _tensor_refusal(first)
        or _side_refusal(*top.shape[2:], *first.shape[2:])
        or _rows_refusal(first.shape[1], first.shape[2])
    )


def weighted_merge_backward(grad: Tensor, input: Tensor, factor: Tensor) -> str | None:
    return _tensor_refusal(grad) or _rows_refusal(grad.shape[1], grad.shape[2]) or _pixels_refusal(*grad.shape[2:])


def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> str | None:
    refusal = _tensor_refusal(feature)
    if refusal is None and top is not None:
        refusal = _side_refusal(*top.shape[2:], *feature.shape[2:]) or _rows_refusal(weight.shape[0], feature.shape[2])
    return refusal or _pixels_refusal(*feature.shape[2:])


def copies_in_bulk(tensor: Tensor) -> bool:
    """Whether a descriptor's boxes are moved by the chip's own copies (TMA), and not by pointers of the threads."""
    return not tensor.is_cuda or capability(tensor.device.index)[0] >= 9


def overlap_refusal(tensor: Tensor) -> str | None:
    """Programmatic dependent launch; the interpreter runs one launch after another, which is as right."""
    return _capability_refusal(tensor.device.index, 9) if tensor.is_cuda else None


def top_down_pathway(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> str | None:
    if mode == "bilinear":
        return "in bilinear mode a level is two launches"
    # Of a top the size alone is asked for, which is that of the feature below it.
    tops = [*features[1:], None]
    for level, (feature, weight, bias, top) in enumerate(zip(features, weights, biases, tops, strict=True)):
        refusal = lateral_connection(feature, weight, bias, top, mode, gain, memory_format)
        if refusal is not None:
            return f"level {level}: {refusal}"
    return overlap_refusal(features[0])


def _descriptor_refusal(name: str, tensor: Tensor, *axes: str) -> str | None:
    """Whether a tensor descriptor reads a map along one of these axes."""
    if geometry.inner_axis(tensor) in axes:
        return None
    layouts = " or ".join({"channels": "NHWC", "pixels": "NCHW"}[axis] for axis in axes)
    return (
        f"{name} is read through a tensor descriptor: an {layouts} map that begins at a multiple of 16 bytes, whose "
        f"strides are such multiples and whose contiguous axis is one, got the shape {list(tensor.shape)}, the strides "
        f"{list(tensor.stride())} and {tensor.dtype}"
    )


def _product_refusal(feature: Tensor, weight: Tensor) -> str | None:
    """What is counted in int32: tiles (of 4 x 4 pixels or more by 32 channels or more), and offsets of the weight."""
    batch, _, height, width = feature.shape
    boxes = batch * -(-height // 4) * -(-width // 4) * -(-weight.shape[0] // 32)
    if boxes >= 2**31:
        return f"{boxes} tiles or more: the kernel counts tiles in int32"
    taps = weight[0, 0].numel()
    if geometry.needs_int64(weight) or weight.shape[0] * taps * (weight.shape[1] + 64) >= 2**31:
        return f"the kernel counts the offsets of a weight in int32, got the shape {list(weight.shape)}"
    return None


def lateral_connection_descriptors(feature: Tensor, weight: Tensor) -> str | None:
    """Why a call that `lateral_connection` serves is not for the kernel over tensor descriptors."""
    return _descriptor_refusal("feature", feature, "channels", "pixels") or _product_refusal(feature, weight)


def _stationary_refusal(feature: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> str | None:
    if INTERPRETED:
        return "the interpreter knows nothing of Gluon"
    if feature.is_cuda and capability(feature.device.index)[0] != 9:
        return "the kernel is written for the tensor cores of compute capability 9.0"
    if feature.dtype == torch.float32:
        return "the kernel multiplies 16-bit numbers"
    if not (geometry.rows_are_aligned(weight) or geometry.rows_are_aligned(weight.t())):
        return "the weight is read through a tensor descriptor, as a matrix whose rows or columns are contiguous"
    if bias is not None and geometry.strides(bias)[0] != 1:
        return "the bias is contiguous"
    if geometry.needs_int64(feature, out):
        return "the kernel counts strides in int32"
    return _product_refusal(feature, weight)


def lateral_connection_stationary(
    feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor
) -> str | None:
    """Why a call that `lateral_connection` serves is not for the kernel that keeps the weight in shared memory."""
    maps = (("feature", feature), ("the result", out), *(() if top is None else (("top", top),)))
    for name, each in maps:
        refusal = _descriptor_refusal(name, each, "channels")
        if refusal is not None:
            return refusal
    if top is not None and not geometry.has_half_the_size(top, out):
        return "the coarser map has half the size of the finer one"
    return _stationary_refusal(feature, weight, bias, out)


def lateral_connection_stationary_flat(
    feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor
) -> str | None:
    """The same, of its twin whose tiles are pixels one after the other."""
    axis = geometry.flat_axis(out)
    if axis is None or geometry.flat_axis(feature) is None:
        return "feature and result are moved through tensor descriptors, the pixels as one axis"
    if axis == "pixels" and geometry.flat_axis(feature) == "channels":
        return "a result in NCHW is made of a feature in NCHW"
    if top is not None and axis == "channels" and geometry.inner_axis(top) != "channels":
        return "top is an NHWC map where the result is one"
    if top is not None and axis == "pixels" and not geometry.has_half_the_size(top, out):
        return "the coarser map has half the size of the finer one"
    if top is not None and geometry.needs_int64(top):
        return "the kernel counts offsets in int32"
    return _stationary_refusal(feature, weight, bias, out)


def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> str | None:
    return (
        _tensor_refusal(feature)
        or _descriptor_refusal("feature", feature, "channels")
        or _product_refusal(feature, weight)
    )


def output_conv_levels(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    memory_format: torch.memory_format | None,
) -> str | None:
    """Why the levels cannot share a launch, or one of them cannot be served."""
    if len(features) > MOST_LEVELS:
        return f"{len(features)} levels: the kernel takes at most {MOST_LEVELS} of them in one launch"
    first, first_weight, first_bias = features[0], weights[0], biases[0]
    for level, (feature, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
        alike = feature.shape[:2] == first.shape[:2] and feature.dtype == first.dtype
        if not alike or (weight.shape, weight.stride()) != (first_weight.shape, first_weight.stride()):
            return f"level {level} differs from level 0 in batch, channels, dtype or the strides of its weight"
        if (bias is None) != (first_bias is None) or (bias is not None and not bias.is_contiguous()):
            return f"level {level}: biases are all None or all contiguous"
        refusal = output_conv(feature, weight, bias, memory_format)
        if refusal is None and not feature.is_contiguous(memory_format=torch.channels_last):
            refusal = "several levels are read as dense NHWC maps"
        if refusal is not None:
            return f"level {level}: {refusal}"
    return None
