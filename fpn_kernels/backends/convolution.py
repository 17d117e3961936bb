"""What is known of PyTorch's own 3x3 convolution on a CPU: the layout, dtype and gradient with which it is fast.

Figures are ms at 256 channels and batch 1; on Zen 4 of one thread unless said otherwise.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Below, what a call costs beside the convolution (a copy, a weight turned about) is not earned back.
_FEW_PIXELS = 2048


def is_large(feature: Tensor) -> bool:
    """Whether a map (or its gradient) has pixels enough for a choice of its layout to pay.

    While a graph is made every map counts as large, so that no size becomes a condition of the graph.
    """
    return torch.compiler.is_compiling() or feature.shape[0] * feature.shape[2] * feature.shape[3] >= _FEW_PIXELS


def fastest_format(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    """The layout of large maps, where one of the two is faster on a CPU; `torch.preserve_format` elsewhere.

    oneDNN multiplies bfloat16 maps in NHWC, and converts NCHW ones on the way in and out: 106 in NCHW against 82 in
    NHWC at 200 x 320 pixels on two cores of Zen 5, 171 and 164 on two of Zen 4; but 5.3 and 5.4 at 25 x 40.  In float32
    neither is ahead (333 and 331).  float64 (ATen's own) is up to twice as fast in NCHW, but rare: left as it is.
    """
    return torch.channels_last if (device_type, dtype) == ("cpu", torch.bfloat16) else torch.preserve_format


def adjoint_is_faster(grad: Tensor) -> bool:
    """Whether the gradient of the feature comes sooner from the convolution with the adjoint weight than from ATen's.

    bfloat16 at 100 x 160 pixels: 83 in NHWC and 87 in NCHW, ATen's 96; at 25 x 40 6.1 and 5.5, for the weight has to be
    turned about (0.5).  float32 at 50 x 80: 42.4 and 43.1; at 25 x 40 11.2 and 10.8.  Unknown on other devices: no.
    """
    return grad.device.type == "cpu" and is_large(grad)


@functools.cache
def _multiplies_float16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def arithmetic_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to convert the maps to before a convolution and from after it: float32 where float16 is slow.

    Without instructions for it, float16 falls to ATen's own loops.  At 25 x 40 pixels the convolution took 350 in NCHW
    and 51 in NHWC, and 11 through float32; the gradient of its weight 60 and 174, and 13 in float32.  A product of two
    float16 numbers is exact in float32; the sum is rounded to float16 once.
    """
    slow = device_type == "cpu" and dtype == torch.float16 and not _multiplies_float16()
    return torch.float32 if slow else dtype
