"""`lateral_connection` by the compiled library, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import aten, dispatch, reorder
from fpn_kernels.operators.dispatch import named
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.layouts import allocate, allocator, result_format, strides_of

_LATERAL_CONNECTION = native.kernel("lateral_connection")
_PATH = native.kernel("lateral_connection_path")
_UPSAMPLE_ADD = native.kernel("upsample_add")

# Elements per vector of float32 accumulators.
_VECTOR = 16


def _refusal(call: LateralConnection) -> str | None:
    return native.cpu_refusal(call.feature)


def _accumulate(
    call: LateralConnection, matrix: Tensor, top: Tensor | None, mode: int, gain: float, out: Tensor
) -> None:
    """Add PyTorch's own matrix product to a result that already holds the bias and the resized top."""
    feature, bias = call.feature, call.bias
    if top is not None:
        start = feature.new_zeros(()) if bias is None else bias.view(1, -1, 1, 1)
        _UPSAMPLE_ADD()(top, start.expand(out.shape), mode, gain, out)
    if feature.shape[1] % 2 == 1:
        # For an odd number of channels, oneDNN's AMX product multiplies the element after each row by zero, and that
        # element may be NaN.
        feature, matrix = feature.contiguous(memory_format=result_format(feature)), matrix.contiguous()
    # The product is computed in the orientation in which its result is contiguous: neither side is transposed.
    swap = out.stride(1) == 1
    line = bias if bias is None or swap else bias[:, None]
    for pixels, result in zip(feature.flatten(2), out.flatten(2), strict=True):
        left, right, target = (pixels.t(), matrix.t(), result.t()) if swap else (matrix, pixels, result)
        start_value = line if top is None else target
        if start_value is None:
            torch.mm(left, right, out=target)
        else:
            torch.addmm(start_value, left, right, alpha=gain, out=target)


def _plan(call: LateralConnection) -> Callable[[LateralConnection], Tensor]:
    """The product that the library chooses for this CPU (csrc/lateral_connection/op.cpp), or PyTorch's.

    PyTorch's convolution and one merge serve where they are faster, and where no product fits.  16-bit maps without a
    product use its matrix product (`_accumulate`) instead, unless 16 bits are multiplied in float32 anyway: PyTorch's
    float32 matrix product was less exact than its convolution on small maps (1.2 times the error at 257 channels).
    """
    feature, top, dtype = call.feature, call.top, call.feature.dtype
    out_format, mode = call.out_format(), native.MODE_NUMBERS[call.mode]
    new = allocator(call.shape(), out_format)
    channels_last = strides_of(call.shape(), out_format)[3] != 1
    path = _PATH()(feature, call.matrix(), top, channels_last)
    # AMX tiles read neighbouring channels of the top, whatever the layout of the result: 1.7 ms at 75 x 113 in NCHW,
    # with the copy, where tops in NCHW took 3.3 ms (256 channels, 2 cores of an Intel Xeon with AMX).
    reorders_top = top is not None and path == "" and native.multiplies_by_tiles(dtype)
    if top is not None and reorders_top:
        path = _PATH()(feature, call.matrix(), allocate(top.shape, top, torch.channels_last), channels_last)
    arithmetic = aten.arithmetic_dtype("cpu", dtype)
    accumulates = path == "" and arithmetic != torch.float32
    by_product = path not in ("", "convolution")
    no_bias = torch.zeros(call.weight.shape[0], dtype=torch.float32, device="cpu") if call.bias is None else None
    connect, merge = _LATERAL_CONNECTION(), _UPSAMPLE_ADD()

    def run(call: LateralConnection) -> Tensor:
        feature, weight, bias, top, _, gain, _ = call
        matrix = weight.flatten(1)
        if top is None:
            gain = 1.0
        elif reorders_top:
            top = reorder.copy(top, torch.channels_last)
        if by_product:
            out = new(feature)
            addend = no_bias if bias is None else bias.float().contiguous()
            if connect(feature, matrix, addend, top, mode, gain, out):
                return out
        if accumulates:
            out = new(feature)
            _accumulate(call, matrix, top, mode, gain, out)
            return out
        if dtype != arithmetic:
            feature, matrix = feature.to(arithmetic), matrix.to(arithmetic)
            bias, top = (None if tensor is None else tensor.to(arithmetic) for tensor in (bias, top))
        lateral = F.conv2d(feature, matrix[:, :, None, None], bias)
        if top is None:
            return lateral.to(dtype).contiguous(memory_format=out_format)
        # In place where the kernel's vectors do not overlap at the end of a row of channels.
        nhwc = channels_last and lateral.is_contiguous(memory_format=torch.channels_last)
        out = lateral if nhwc and lateral.shape[1] % _VECTOR == 0 else new(lateral)
        merge(top, lateral, mode, gain, out)
        return out.to(dtype)

    by_pytorch = "PyTorch's matrix product" if accumulates else "PyTorch's convolution, then one merge"
    return named(run, path if by_product else by_pytorch)


LATERAL_CONNECTION = dispatch.Implementation(_plan, _refusal)
