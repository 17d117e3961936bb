"""PyTorch's own convolution on a CPU: its fastest layout, dtype and gradient.

Figures are ms for 3x3 at 256 channels and batch 1, on one thread of Zen 4 unless stated otherwise.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fpn_kernels.operators.layouts import result_format

# Below this size, the fixed cost of a call (a copy, a rotated weight) exceeds the gain.
_MIN_PIXELS = 2048
# The same where both products are the library's own and ATen's are slow.
_MIN_PIXELS_AVX2 = 256
# From this size on, the faster layout gains more than the copy costs.
_MIN_PIXELS_TO_REORDER = 8192


def is_large(feature: Tensor, min_pixels: int | None = None) -> bool:
    """Whether a map (or its gradient) has at least `min_pixels` pixels, `_MIN_PIXELS` by default.

    While torch traces, every map counts as large, so that the graph has no guard on sizes.
    """
    pixels = feature.shape[0] * feature.shape[2] * feature.shape[3]
    # torch 2.11 traces a backward without `is_compiling`.
    if torch.compiler.is_compiling() or isinstance(pixels, torch.SymInt):
        return True
    return pixels >= (_MIN_PIXELS if min_pixels is None else min_pixels)


def fastest_format(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    """The faster layout of large maps on a CPU; `torch.preserve_format` where neither is.

    oneDNN multiplies bfloat16 maps in NHWC, and converts NCHW ones on the way in and out: 106 in NCHW against 82 in
    NHWC at 200 x 320 pixels on two cores of Zen 5, 171 and 164 on two of Zen 4; but 5.3 and 5.4 at 25 x 40.  In float32
    neither is faster (333 and 331).  float64 (ATen's own) is up to twice as fast in NCHW, but rare: left as it is.
    """
    nhwc = (device_type, dtype) == ("cpu", torch.bfloat16) and onednn_multiplies(dtype)
    return torch.channels_last if nhwc else torch.preserve_format


def by_avx2(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a dtype is multiplied in float32 on a CPU whose widest vectors are AVX2's.

    There oneDNN computes the gradient of the weight slowly from NHWC maps: 2,339 against 446 in NCHW at 150 x 225
    pixels on two cores of Zen 3, 809 and 243 at 100 x 160, 122 and 55 at 50 x 80, 21 and 16 at 25 x 40.  The compiled
    library's own product, from NHWC maps, takes half the time of PyTorch's in NCHW.
    """
    narrow = device_type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return narrow and arithmetic_dtype(device_type, dtype) == torch.float32


def adjoint_is_faster(grad: Tensor, by_tiles: bool) -> bool:
    """Whether the convolution with the adjoint weight is faster than ATen's gradient of the feature.

    Of both gradients, by the adjoint against ATen's.  float32 on Zen 4 at 50 x 80 pixels: 42.4 and 43.1; at 25 x 40
    11.2 and 10.8, because the weight has to be rotated (0.5).  bfloat16 without tiles gains only where ATen's would
    change the layout, on large maps.  On two cores of Zen 4 in NCHW 216 and 233 at 150 x 225, 88 and 93 at 100 x 160,
    47 and 49 at 75 x 113, but 25.1 and 23.8 at 50 x 80; in NHWC 203 and 199, 90 and 88, 47.0 and 45.9, 23.5 and 22.5.
    Unknown on other devices: no.

    Args:
        grad: the gradient of the convolution's result.
        by_tiles: whether bfloat16 is multiplied by AMX tiles.
    """
    if grad.device.type != "cpu":
        return False
    if by_avx2("cpu", grad.dtype):
        return is_large(grad, _MIN_PIXELS_AVX2)
    if grad.dtype != torch.bfloat16 or by_tiles or not onednn_multiplies(grad.dtype):
        return is_large(grad)
    return result_format(grad) == torch.contiguous_format and is_large(grad, _MIN_PIXELS_TO_REORDER)


def gradients_are_atens(device_type: str) -> bool:
    """Whether both gradients of a 3x3 convolution are ATen's, of any map: on a CPU they are chosen map by map."""
    return device_type != "cpu"


def gradients(
    grad: Tensor, feature: Tensor, weight: Tensor | None, wants_bias: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """ATen's gradients: of the feature where the weight is given, of the weight, and of the bias where wanted."""
    dtype = arithmetic_dtype(grad.device.type, grad.dtype)
    # ATen reads only the weight's shape for its own gradient.  Zeros would need a launch, and oneDNN copies an expanded
    # number to each element.
    values = feature.new_empty((grad.shape[1], feature.shape[1], 3, 3)) if weight is None else weight
    computed = torch.ops.aten.convolution_backward.default(
        *((grad, feature, values) if dtype == grad.dtype else (t.to(dtype) for t in (grad, feature, values))),
        [grad.shape[1]],
        *([1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        [weight is not None, True, wants_bias],
    )
    of_feature, of_weight, of_bias = computed
    if dtype != grad.dtype:
        of_feature, of_weight, of_bias = (None if g is None else g.to(grad.dtype) for g in computed)
    assert of_weight is not None
    return of_feature, of_weight, of_bias


def gradient_of_weight(
    grad: Tensor, feature: Tensor, wants_bias: bool, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """ATen's gradients of the weight, in `memory_format`, and of the bias, without elements if not `wants_bias`."""
    _, of_weight, of_bias = gradients(grad, feature, None, wants_bias)
    return of_weight.contiguous(memory_format=memory_format), grad.new_empty(0) if of_bias is None else of_bias


@functools.cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a 16-bit dtype on this CPU."""
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_fp16_supported if dtype == torch.float16 else mkldnn._is_mkldnn_bf16_supported
    return torch.backends.mkldnn.is_available() and bool(supported())


def arithmetic_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product: float32 where products in 16 bits are slow on this CPU.

    Without instructions for it, a dtype falls to ATen's own loops.  float16 at 25 x 40 pixels: the convolution took 350
    in NCHW and 51 in NHWC, and 11 through float32; the gradient of its weight 60 and 174, and 13 in float32.  bfloat16
    there on two cores of Zen 3, which has nothing beyond AVX2: 794, 67 and 10; 76, 75 and 18.  A product of two 16-bit
    numbers is exact in float32; the sum is rounded to 16 bits once.
    """
    slow = device_type == "cpu" and dtype in (torch.float16, torch.bfloat16) and not onednn_multiplies(dtype)
    return torch.float32 if slow else dtype
