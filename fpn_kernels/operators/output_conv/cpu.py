"""`output_conv` and `output_conv_backward_weight` by the compiled library, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import aten, dispatch
from fpn_kernels.operators.dispatch import named
from fpn_kernels.operators.layouts import allocate, allocator
from fpn_kernels.operators.output_conv.call import OutputConv, OutputConvBackwardWeight
from fpn_kernels.operators.reorder import in_layout

_OUTPUT_CONV = native.kernel("output_conv")
_PATH = native.kernel("output_conv_path")
_OUTPUT_CONV_BACKWARD_WEIGHT = native.kernel("output_conv_backward_weight")
_BACKWARD_WEIGHT_PATH = native.kernel("output_conv_backward_weight_path")


def _refusal(call: OutputConv | OutputConvBackwardWeight) -> str | None:
    return native.cpu_refusal(call[0])


def _fastest_format(device_type: str, dtype: torch.dtype) -> torch.memory_format | None:
    return aten.fastest_format(device_type, dtype) if device_type == "cpu" else None


def _convolve(feature: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own 3x3 convolution, in the layout and the dtype in which it is fast."""
    memory_format = aten.fastest_format("cpu", feature.dtype)
    if memory_format != torch.preserve_format and aten.is_large(feature):
        feature = in_layout(feature, memory_format)
    dtype = aten.arithmetic_dtype("cpu", feature.dtype)
    if dtype == feature.dtype:
        return F.conv2d(feature, weight, bias, padding=1)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(feature.to(dtype), weight.to(dtype), bias, padding=1).to(feature.dtype)


def _plan(call: OutputConv) -> Callable[[OutputConv], Tensor]:
    """The product that the library chooses for this CPU (csrc/output_conv/op.cpp), written in the requested layout.

    Where it chooses PyTorch's convolution, a fast copy follows if the result has another layout.
    """
    out_format, dtype = call.out_format(), call.feature.dtype
    new = allocator(call.shape(), out_format)
    path = _PATH()(call.feature, call.weight)
    # The copy that the tiles make themselves takes twice as long: a block's share of a channel is short.
    reorders = native.multiplies_by_tiles(dtype) and aten.is_large(call.feature)
    convolve = _OUTPUT_CONV()

    def run(call: OutputConv) -> Tensor:
        feature, weight, bias, _ = call
        if reorders:
            feature = in_layout(feature, aten.fastest_format("cpu", dtype))
        if path != "convolution":
            out = new(feature)
            if convolve(feature, weight, bias, out):
                return out
        return in_layout(_convolve(feature, weight, bias), out_format)

    return named(run, "PyTorch's convolution" if path == "convolution" else path)


def _plan_backward_weight(
    call: OutputConvBackwardWeight,
) -> Callable[[OutputConvBackwardWeight], tuple[Tensor, Tensor]]:
    """By AMX tiles where the CPU has them, by Winograd's filtering on AVX2, else PyTorch's own.

    The tiles read maps of any layout, and of two layouts.  Milliseconds with 256 channels on two cores of an Intel Xeon
    with AMX, PyTorch's own and by tiles, in NHWC and in NCHW: 46.6 and 30.9, 65.6 and 33.9 at 200 x 320 pixels; 16.0
    and 8.2, 19.8 and 9.2 at 100 x 160; 4.3 and 2.0, 4.8 and 2.3 at 50 x 80; 1.7 and 0.6, 1.7 and 0.7 at 25 x 40.  On
    one core the tiles were ahead with 16 to 512 channels, and on a single pixel.

    Winograd's filtering reads NHWC.  On two cores of Zen 3 in float32, PyTorch's own in NCHW (in NHWC: see
    `aten.by_avx2`) and Winograd's: 482 and 233 at 150 x 225 pixels, 202 and 99 at 100 x 160, 78 and 37 at 50 x 80,
    20 and 10 at 25 x 40, 5.9 and 3.5 at 13 x 20.  Its error is a seventh to a half of that of PyTorch's own.

    The library declines maps with a value that is not finite (both products multiply the zeros around the maps), very
    wide maps by tiles, and few channels on many threads.
    """
    grad, feature, wants_bias = call.grad, call.feature, call.wants_bias
    by_avx2 = aten.by_avx2("cpu", grad.dtype)
    shape, out_format = call.shape(), call.out_format()
    if by_avx2:
        grad, feature = (allocate(tensor.shape, tensor, torch.channels_last) for tensor in (grad, feature))
    path = _BACKWARD_WEIGHT_PATH()(grad, feature)
    if path == "convolution":
        by_pytorch = lambda call: aten.gradient_of_weight(call.grad, call.feature, wants_bias, out_format)  # noqa: E731
        return named(by_pytorch, "PyTorch's gradient")
    channels = grad.shape[1] if wants_bias else 0
    multiply = _OUTPUT_CONV_BACKWARD_WEIGHT()

    def run(call: OutputConvBackwardWeight) -> tuple[Tensor, Tensor]:
        grad, feature = call.grad, call.feature
        grad_weight = allocate(shape, grad, out_format)
        # The library sums in float64; the sum is rounded here, once.
        sums = torch.empty(channels, dtype=torch.float64, device="cpu")
        if by_avx2:
            grad, feature = (in_layout(tensor, torch.channels_last) for tensor in (grad, feature))
        # Whether it declines is not cached: it depends on values as well.
        if multiply(grad, feature, grad_weight, sums if wants_bias else None):
            return grad_weight, sums.to(grad.dtype)
        if by_avx2 and aten.is_large(grad):
            grad, feature = (in_layout(tensor, torch.contiguous_format) for tensor in (grad, feature))
        return aten.gradient_of_weight(grad, feature, wants_bias, out_format)

    return named(run, path)


OUTPUT_CONV = dispatch.Implementation(_plan, _refusal, fastest_format=_fastest_format)
OUTPUT_CONV_BACKWARD_WEIGHT = dispatch.Implementation(_plan_backward_weight, _refusal)
