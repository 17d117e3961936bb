"""The compiled library: loads it once, reports why it is missing, and calls it.

`csrc/` is built into one shared library in this package, which registers its operators through the LibTorch stable ABI.
It is loaded on first use; if that fails, the first error is kept and shown by `python -m fpn_kernels`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.backends import convolution, evidence, library_file
from fpn_kernels.backends.eager import normalized
from fpn_kernels.backends.layouts import allocate, allocator, requested_format, result_format
from fpn_kernels.backends.selection import AtOnce, Backend, Implementation
from fpn_kernels.resampling import MODES

# The path of another build, e.g. one with sanitizers.
ENVIRONMENT_VARIABLE = "FPN_KERNELS_LIBRARY"
LIBRARY = pathlib.Path(
    os.environ.get(ENVIRONMENT_VARIABLE) or pathlib.Path(__file__).resolve().parents[1] / "_native.so"
)

_CURE = "`make build`, or `pip install --no-build-isolation .`, builds it"

# The library's numbers of the modes.
_MODE_NUMBERS = {mode: number for number, mode in enumerate(MODES)}
# Elements of a vector of float32 sums.
_VECTOR = 16
# Queries of the product that computes a call (csrc/README.md).
_PATHS = ("lateral_connection_path", "output_conv_path", "output_conv_backward_weight_path")


@functools.cache
def load_error() -> str | None:
    """Load the library; returns the reason why it cannot be used, or None."""
    try:
        if not LIBRARY.is_file():
            return f"the compiled library was not built ({LIBRARY}); {_CURE}"
        fault = library_file.fault(LIBRARY)
        if fault is not None:
            return f"the compiled library would not load: {LIBRARY}: {fault}; {_CURE}"
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library would not load: {error}; {_CURE}"
    # A library of earlier sources loads, and would fail at the first call.
    missing = [name for name in (*_IMPLEMENTATIONS, *_PATHS) if not hasattr(torch.ops.fpn_kernels_native, name)]
    if missing:
        return f"the compiled library {LIBRARY} is of another version: it has no {', '.join(missing)}; {_CURE}"
    return None


@AtOnce
def upsample_add(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Callable[..., Tensor]:
    new, number = allocator(lateral.shape, result_format(lateral)), _MODE_NUMBERS[mode]
    merge = torch.ops.fpn_kernels_native.upsample_add.default

    def run(top: Tensor, lateral: Tensor, mode: str, gain: float) -> Tensor:
        out = new(lateral)
        merge(top, lateral, number, gain, out)
        return out

    return run


@AtOnce
def upsample_add_backward(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> Callable[..., Tensor]:
    new, number = allocator((*grad.shape[:2], *top_size), result_format(grad)), _MODE_NUMBERS[mode]
    adjoint = torch.ops.fpn_kernels_native.upsample_add_backward.default

    def run(grad: Tensor, top_size: tuple[int, int], mode: str, gain: float) -> Tensor:
        grad_top = new(grad)
        adjoint(grad, number, gain, grad_top)
        return grad_top

    return run


@AtOnce
def merge_backward(
    grad: Tensor, top_size: tuple[int, int], own: Tensor | None, mode: str, gain: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    new, number = allocator((*grad.shape[:2], *top_size), result_format(grad)), _MODE_NUMBERS[mode]
    adjoint = torch.ops.fpn_kernels_native.merge_backward.default

    def run(
        grad: Tensor, top_size: tuple[int, int], own: Tensor | None, mode: str, gain: float
    ) -> tuple[Tensor, Tensor]:
        grad_top = new(grad)
        # The library adds up in float64; rounded here, once.
        grad_bias = torch.empty(grad.shape[1], dtype=torch.float64, device="cpu")
        # An own gradient that lies in memory as the result does is added in the same pass.
        alike = own is not None and own.stride() == grad_top.stride()
        adjoint(grad, own if alike else None, number, gain, grad_top, grad_bias)
        return grad_top if own is None or alike else grad_top.add_(own), grad_bias.to(grad.dtype)

    return run


@AtOnce
def weighted_merge(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    weights: Tensor,
    mode: str,
    normalization: str = "none",
    eps: float = 0.0,
) -> Callable[..., Tensor]:
    new, number = allocator(first.shape, result_format(first)), _MODE_NUMBERS[mode]
    merge, relu = torch.ops.fpn_kernels_native.weighted_merge.default, normalization == "relu"
    # The library reads these; softmax is left to PyTorch, whose exponential is not the C library's bit for bit.
    read_as_given = normalization != "softmax" and weights.dtype in (torch.float32, torch.float64)

    def run(first: Tensor, second: Tensor, third: Tensor | None, weights: Tensor, mode: str, *_: object) -> Tensor:
        out = new(first)
        if not read_as_given:
            weights = normalized(weights, first, "none" if relu else normalization, eps)
        merge(first, second, third, weights, relu, eps, number, out)
        return out

    return run


@AtOnce
def weighted_merge_backward(grad: Tensor, input: Tensor, factor: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    new = allocator(grad.shape, result_format(grad))
    adjoint = torch.ops.fpn_kernels_native.weighted_merge_backward.default

    def run(grad: Tensor, input: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        grad_input = new(grad)
        # The library adds up in float64; rounded here, once.
        grad_factor = torch.empty((), dtype=torch.float64, device="cpu")
        adjoint(grad, input, factor, grad_input, grad_factor)
        return grad_input, grad_factor.to(factor.dtype)

    return run


def _accumulate(
    feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, mode: int, gain: float, out: Tensor
) -> None:
    """PyTorch's own matrix product, added to a result that already holds the bias and the resized top."""
    if top is not None:
        start = feature.new_zeros(()) if bias is None else bias.view(1, -1, 1, 1)
        torch.ops.fpn_kernels_native.upsample_add.default(top, start.expand(out.shape), mode, gain, out)
    if feature.shape[1] % 2 == 1:
        # oneDNN's AMX product of an odd number of channels multiplies what follows each line by zero.  That may be NaN.
        feature, weight = feature.contiguous(memory_format=result_format(feature)), weight.contiguous()
    # The product is written the way round in which its result is contiguous: neither side is transposed.
    swap = out.stride(1) == 1
    line = bias if bias is None or swap else bias[:, None]
    for pixels, result in zip(feature.flatten(2), out.flatten(2), strict=True):
        left, right, target = (pixels.t(), weight.t(), result.t()) if swap else (weight, pixels, result)
        start_value = line if top is None else target
        if start_value is None:
            torch.mm(left, right, out=target)
        else:
            torch.addmm(start_value, left, right, alpha=gain, out=target)


@functools.cache
def multiplies_by_tiles(dtype: torch.dtype) -> bool:
    """Whether the library multiplies maps of this dtype by AMX tiles on this CPU."""
    if dtype != torch.bfloat16 or load_error() is not None:
        return False
    return bool(torch.ops.fpn_kernels_native.multiplies_by_tiles.default())


def _convolution_is_faster(feature: Tensor, out_format: torch.memory_format, has_top: bool) -> bool:
    """Where PyTorch's convolution, and the merge as a second pass over its result, beat the product that does both.

    bfloat16, short sums with nothing to merge and no layout to change.  Measured on Zen 5: the library's own took 1.03
    to 1.05 times as long at 256 and 1,024 channels, 0.88 at 2,048; by AMX tiles 1.07 at 256, 1.13 at 512, 0.89 at 1,024
    and 0.84 at 2,048.

    float32, long sums in NHWC, where the second pass is short beside them.  Measured on an Intel Xeon with AMX: the
    library's own took 1.07, 1.14 and 1.28 times as long at 512, 1,024 and 2,048 channels.
    """
    nhwc = torch.channels_last
    if not out_format == nhwc == result_format(feature):
        return False
    if feature.dtype == torch.bfloat16:
        return convolution.onednn_multiplies(feature.dtype) and not has_top and feature.shape[1] <= 1024
    return feature.dtype == torch.float32 and feature.shape[1] >= 512


def _merge_in_place(top: Tensor, lateral: Tensor, mode: int, gain: float) -> Tensor:
    """The merge, over the lateral where the kernel's vectors do not overlap at the end of a line of channels."""
    in_place = lateral.is_contiguous(memory_format=torch.channels_last) and lateral.shape[1] % _VECTOR == 0
    out = lateral if in_place else allocate(lateral.shape, lateral, result_format(lateral))
    torch.ops.fpn_kernels_native.upsample_add.default(top, lateral, mode, gain, out)
    return out


@AtOnce
def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> Callable[..., Tensor]:
    """The library's own matrix product where it is the faster one on this CPU, else PyTorch's.

    PyTorch's serves 16-bit maps by `_accumulate`.  float32 maps, and maps of a dtype that is multiplied in float32, go
    through its convolution and one merge instead: its float32 matrix product was measured less exact than its
    convolution on small maps (257 channels: 1.2 times).
    """
    out_format = requested_format(feature, memory_format)
    new = allocator((feature.shape[0], weight.shape[0], *feature.shape[2:]), out_format)
    number = _MODE_NUMBERS[mode]
    by_convolution = _convolution_is_faster(feature, out_format, top is not None)
    dtype, arithmetic = feature.dtype, convolution.arithmetic_dtype("cpu", feature.dtype)
    # Tiles add channels side by side, whatever the layout of the result: at 75 x 113 in NCHW 1.7 ms, copy included,
    # where tops in NCHW took 3.3 (256 channels, 2 cores of an Intel Xeon with AMX).
    turns_top = top is not None and top.stride(1) != 1 and not by_convolution and multiplies_by_tiles(feature.dtype)
    declined = False  # by the library, which goes by what calls alike have in common
    no_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu") if bias is None else None
    connect = torch.ops.fpn_kernels_native.lateral_connection.default
    merge = torch.ops.fpn_kernels_native.upsample_add.default

    def run(
        feature: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        top: Tensor | None,
        mode: str,
        gain: float,
        memory_format: torch.memory_format | None,
    ) -> Tensor:
        nonlocal declined
        if top is None:
            gain = 1.0
        if turns_top and top is not None:
            top = _reorder(top, torch.channels_last)
        if not by_convolution and not declined:
            out = new(feature)
            addend = no_bias if bias is None else bias.float().contiguous()
            if connect(feature, weight, addend, top, number, gain, out):
                return out
            declined = True
        if not by_convolution and arithmetic != torch.float32:
            out = new(feature)
            _accumulate(feature, weight, bias, top, number, gain, out)
            return out
        if dtype != arithmetic:
            feature, weight = feature.to(arithmetic), weight.to(arithmetic)
            bias, top = (None if tensor is None else tensor.to(arithmetic) for tensor in (bias, top))
        lateral = F.conv2d(feature, weight[:, :, None, None], bias)
        if top is None:
            return lateral.to(dtype).contiguous(memory_format=out_format)
        if by_convolution:
            return _merge_in_place(top, lateral, number, gain)
        out = new(lateral)
        merge(top, lateral, number, gain, out)
        return out.to(dtype)

    return run


def _reorder(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    out = allocate(source.shape, source, memory_format)
    torch.ops.fpn_kernels_native.reorder.default(source, out)
    return out


def _in_layout(source: Tensor, memory_format: torch.memory_format) -> Tensor:
    return source if source.is_contiguous(memory_format=memory_format) else _reorder(source, memory_format)


def _convolve(feature: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own 3x3 convolution, in the layout and the dtype in which it is fast."""
    memory_format = convolution.fastest_format("cpu", feature.dtype)
    if memory_format != torch.preserve_format and convolution.is_large(feature):
        feature = _in_layout(feature, memory_format)
    dtype = convolution.arithmetic_dtype("cpu", feature.dtype)
    if dtype == feature.dtype:
        return F.conv2d(feature, weight, bias, padding=1)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(feature.to(dtype), weight.to(dtype), bias, padding=1).to(feature.dtype)


@AtOnce
def output_conv(
    feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None
) -> Callable[..., Tensor]:
    """The library's own convolution where it is the faster one on this CPU, written in the layout asked for.

    Elsewhere PyTorch's, and a fast copy where its result has another layout.
    """
    out_format = requested_format(feature, memory_format)
    new = allocator((feature.shape[0], weight.shape[0], *feature.shape[2:]), out_format)
    by_tiles = multiplies_by_tiles(feature.dtype)
    own = True  # until the library declines
    # The tiles' own copy takes twice as long: a block's share of a channel is short.
    turns = by_tiles and convolution.is_large(feature)
    convolve = torch.ops.fpn_kernels_native.output_conv.default

    def run(feature: Tensor, weight: Tensor, bias: Tensor | None, memory_format: torch.memory_format | None) -> Tensor:
        nonlocal own
        if turns:
            feature = _in_layout(feature, convolution.fastest_format("cpu", feature.dtype))
        if own:
            out = new(feature)
            if convolve(feature, weight, bias, out):
                return out
            own = False  # it goes by what calls alike have in common
        return _in_layout(_convolve(feature, weight, bias), out_format)

    return run


@AtOnce
def reorder(source: Tensor, memory_format: torch.memory_format) -> Callable[..., Tensor]:
    return _reorder


@AtOnce
def output_conv_backward_weight(
    grad: Tensor, feature: Tensor, wants_bias: bool, memory_format: torch.memory_format
) -> Callable[..., tuple[Tensor, Tensor]]:
    """By AMX tiles where there are those, by Winograd's filtering on AVX2, else PyTorch's own.

    The tiles read maps of any layout, and of two.  Milliseconds with 256 channels on two cores of an Intel Xeon with
    AMX, PyTorch's own and by tiles, in NHWC and in NCHW: 46.6 and 30.9, 65.6 and 33.9 at 200 x 320 pixels; 16.0 and
    8.2, 19.8 and 9.2 at 100 x 160; 4.3 and 2.0, 4.8 and 2.3 at 50 x 80; 1.7 and 0.6, 1.7 and 0.7 at 25 x 40.  On one
    core the tiles were ahead with 16 to 512 channels, and on a single pixel.

    Winograd's filtering reads NHWC.  On two cores of Zen 3 in float32, PyTorch's own in NCHW (in NHWC: see
    `convolution.by_avx2`) and by it: 482 and 233 at 150 x 225 pixels, 202 and 99 at 100 x 160, 78 and 37 at 50 x 80,
    20 and 10 at 25 x 40, 5.9 and 3.5 at 13 x 20.  It errs by a seventh to a half of what PyTorch's own does.

    Not served by the library are also maps of which a value is not finite (both multiply the zeros around the maps),
    very wide ones by tiles, and few channels on many threads.
    """
    by_tiles, by_avx2 = multiplies_by_tiles(grad.dtype), convolution.by_avx2("cpu", grad.dtype)
    if not by_tiles and not by_avx2:
        return convolution.gradient_of_weight
    shape, channels = (grad.shape[1], feature.shape[1], 3, 3), grad.shape[1] if wants_bias else 0
    multiply = torch.ops.fpn_kernels_native.output_conv_backward_weight.default

    def run(
        grad: Tensor, feature: Tensor, wants_bias: bool, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        grad_weight = allocate(shape, grad, memory_format)
        # The library adds up in float64; rounded here, once.
        sums = torch.empty(channels, dtype=torch.float64, device="cpu")
        if by_avx2:
            grad, feature = (_in_layout(tensor, torch.channels_last) for tensor in (grad, feature))
        # Not remembered where it says no: values decide as well.
        if multiply(grad, feature, grad_weight, sums if wants_bias else None):
            return grad_weight, sums.to(grad.dtype)
        if by_avx2 and convolution.is_large(grad):
            grad, feature = (_in_layout(tensor, torch.contiguous_format) for tensor in (grad, feature))
        return convolution.gradient_of_weight(grad, feature, wants_bias, memory_format)

    return run


def _output_conv_format(device_type: str, dtype: torch.dtype) -> torch.memory_format | None:
    return convolution.fastest_format(device_type, dtype) if device_type == "cpu" else None


@functools.cache
def cuda_refusal(device: int) -> str | None:
    """Why the library's kernels cannot run on a GPU, or None."""
    question = getattr(torch.ops.fpn_kernels_native, "cuda_refusal", None)
    if question is None:
        return "was built without kernels for CUDA"
    reason: str = question.default(device)
    return f"its kernels cannot run on cuda:{device}: {reason}" if reason else None


def _refusal(tensor: Tensor, *_: object) -> str | None:
    """What the CPU and CUDA have in common."""
    if tensor.device.type == "cuda":
        return cuda_refusal(tensor.device.index)
    if tensor.device.type != "cpu":
        return f"was built for the CPU and CUDA, got a tensor on {tensor.device}"
    return None


def _refusal_but_on_the_cpu(tensor: Tensor, *_: object) -> str | None:
    if tensor.device.type != "cpu":
        return f"has it for the CPU alone, got a tensor on {tensor.device}"
    return None


_IMPLEMENTATIONS: dict[str, Implementation] = {
    "upsample_add": Implementation(upsample_add.prepare, _refusal),
    "upsample_add_backward": Implementation(upsample_add_backward.prepare, _refusal),
    "lateral_connection": Implementation(lateral_connection.prepare, _refusal_but_on_the_cpu),
    "merge_backward": Implementation(merge_backward.prepare, _refusal_but_on_the_cpu),
    "weighted_merge": Implementation(weighted_merge.prepare, _refusal_but_on_the_cpu),
    "weighted_merge_backward": Implementation(weighted_merge_backward.prepare, _refusal_but_on_the_cpu),
    "output_conv": Implementation(output_conv.prepare, _refusal_but_on_the_cpu, _output_conv_format),
    "output_conv_backward_weight": Implementation(output_conv_backward_weight.prepare, _refusal_but_on_the_cpu),
    "reorder": Implementation(reorder.prepare, _refusal_but_on_the_cpu),
}

_IMPLEMENTATIONS = {
    operator: dataclasses.replace(implementation, evidence=evidence.of("native", operator))
    for operator, implementation in _IMPLEMENTATIONS.items()
}

BACKEND = Backend(name="native", unavailable=load_error, implementations=_IMPLEMENTATIONS)
