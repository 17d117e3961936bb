"""`lateral_connection` by the compiled library, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels import native
from fpn_kernels.operators import aten, dispatch, reorder
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.layouts import allocate, allocator, result_format

_LATERAL_CONNECTION = native.kernel("lateral_connection")
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


def _convolution_is_faster(feature: Tensor, out_format: torch.memory_format, has_top: bool) -> bool:
    """Where PyTorch's convolution, and the merge as a second pass over its result, beat the product that does both.

    bfloat16, few channels, no top and no change of layout.  Measured on Zen 5: the library's own product took 1.03 to
    1.05 times as long at 256 and 1,024 channels, 0.88 at 2,048; by AMX tiles 1.07 at 256, 1.13 at 512, 0.89 at 1,024
    and 0.84 at 2,048.

    float32, many channels in NHWC, where the second pass is short compared with the product.  Measured on an Intel Xeon
    with AMX: the library's own took 1.07, 1.14 and 1.28 times as long at 512, 1,024 and 2,048 channels.
    """
    nhwc = torch.channels_last
    if not out_format == nhwc == result_format(feature):
        return False
    if feature.dtype == torch.bfloat16:
        return aten.onednn_multiplies(feature.dtype) and not has_top and feature.shape[1] <= 1024
    return feature.dtype == torch.float32 and feature.shape[1] >= 512


def _merge_in_place(top: Tensor, lateral: Tensor, mode: int, gain: float) -> Tensor:
    """Merge over the lateral where the kernel's vectors do not overlap at the end of a row of channels."""
    in_place = lateral.is_contiguous(memory_format=torch.channels_last) and lateral.shape[1] % _VECTOR == 0
    out = lateral if in_place else allocate(lateral.shape, lateral, result_format(lateral))
    _UPSAMPLE_ADD()(top, lateral, mode, gain, out)
    return out


def _plan(call: LateralConnection) -> Callable[[LateralConnection], Tensor]:
    """The library's own matrix product where it is the faster one on this CPU, else PyTorch's.

    PyTorch's serves 16-bit maps by `_accumulate`.  float32 maps, and maps whose dtype is multiplied in float32, use its
    convolution and one merge instead: its float32 matrix product was less exact than its convolution on small maps
    (1.2 times the error at 257 channels).
    """
    feature, out_format = call.feature, call.out_format()
    new, mode = allocator(call.shape(), out_format), native.MODE_NUMBERS[call.mode]
    has_top, dtype = call.top is not None, feature.dtype
    by_convolution = _convolution_is_faster(feature, out_format, has_top)
    arithmetic = aten.arithmetic_dtype("cpu", dtype)
    # AMX tiles read neighbouring channels of the top, whatever the layout of the result: 1.7 ms at 75 x 113 in NCHW,
    # with the copy, where tops in NCHW took 3.3 ms (256 channels, 2 cores of an Intel Xeon with AMX).
    reorders_top = (
        call.top is not None and call.top.stride(1) != 1 and not by_convolution and native.multiplies_by_tiles(dtype)
    )
    declined = False  # by the library, by metadata that is part of the cache key
    no_bias = torch.zeros(call.weight.shape[0], dtype=torch.float32, device="cpu") if call.bias is None else None
    connect = _LATERAL_CONNECTION()
    merge = _UPSAMPLE_ADD()

    def run(call: LateralConnection) -> Tensor:
        nonlocal declined
        feature, weight, bias, top, _, gain, _ = call
        matrix = weight.flatten(1)
        if top is None:
            gain = 1.0
        if reorders_top and top is not None:
            top = reorder.copy(top, torch.channels_last)
        if not by_convolution and not declined:
            out = new(feature)
            addend = no_bias if bias is None else bias.float().contiguous()
            if connect(feature, matrix, addend, top, mode, gain, out):
                return out
            declined = True
        if not by_convolution and arithmetic != torch.float32:
            out = new(feature)
            _accumulate(call, matrix, top, mode, gain, out)
            return out
        if dtype != arithmetic:
            feature, matrix = feature.to(arithmetic), matrix.to(arithmetic)
            bias, top = (None if tensor is None else tensor.to(arithmetic) for tensor in (bias, top))
        lateral = F.conv2d(feature, matrix[:, :, None, None], bias)
        if top is None:
            return lateral.to(dtype).contiguous(memory_format=out_format)
        if by_convolution:
            return _merge_in_place(top, lateral, mode, gain)
        out = new(lateral)
        merge(top, lateral, mode, gain, out)
        return out.to(dtype)

    return run


LATERAL_CONNECTION = dispatch.Implementation(_plan, _refusal)
