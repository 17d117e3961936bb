"""What the operators mean, in float64, by explicit indices: independent of `F.interpolate` and of every kernel.

`F.interpolate` itself cannot be the oracle in float64: on contiguous CPU maps it then takes a float64 source index,
another one than for the dtype under test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def nearest_index(in_size: int, out_size: int, mode: str) -> list[int]:
    """`min(floor(float32(dst [+ 0.5]) * float32(in / out)), in - 1)`, one scalar at a time in NumPy's float32."""
    scale = np.float32(in_size) / np.float32(out_size)
    half = np.float32(0.5 if mode == "nearest-exact" else 0.0)
    return [min(int(np.floor((np.float32(d) + half) * scale)), in_size - 1) for d in range(out_size)]


def resize_matrix(in_size: int, out_size: int, mode: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The resize along one axis as a matrix ``[out, in]`` in float64; `dtype` is that of the maps."""
    matrix = torch.zeros(out_size, in_size, dtype=torch.float64)
    if mode != "bilinear":
        matrix[torch.arange(out_size), nearest_index(in_size, out_size, mode)] = 1
        return matrix
    real = np.float64 if dtype == torch.float64 else np.float32
    scale = real(in_size) / real(out_size)
    for d in range(out_size):
        source = max(scale * (real(d) + real(0.5)) - real(0.5), real(0))
        low = min(int(source), in_size - 1)
        high = min(low + 1, in_size - 1)
        matrix[d, low] += float(1 - (source - real(low)))
        matrix[d, high] += float(source - real(low))
    return matrix


def resize(top: Tensor, size: tuple[int, int], mode: str, dtype: torch.dtype | None = None) -> Tensor:
    """Differentiable, float64, on the CPU; `dtype` is that of the maps, where `top` has been widened already."""
    rows = resize_matrix(top.shape[2], size[0], mode, dtype or top.dtype)
    columns = resize_matrix(top.shape[3], size[1], mode, dtype or top.dtype)
    return torch.einsum("yh,nchw,xw->ncyx", rows, top.double().cpu(), columns)


def upsample_add(top: Tensor, lateral: Tensor, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    return gain * (lateral.double().cpu() + resize(top, (lateral.shape[2], lateral.shape[3]), mode))


def upsample_add_backward(grad: Tensor, top_size: Sequence[int], mode: str = "nearest", gain: float = 1.0) -> Tensor:
    """The adjoint of the resize, scaled."""
    rows, columns = (resize_matrix(i, o, mode, grad.dtype) for i, o in zip(top_size, grad.shape[2:], strict=True))
    return gain * torch.einsum("yh,ncyx,xw->nchw", rows, grad.double().cpu(), columns)


def merge_backward(
    grad: Tensor, top_size: Sequence[int], own: Tensor | None, mode: str = "nearest", gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    top = upsample_add_backward(grad, top_size, mode, gain)
    return top if own is None else top + own.double().cpu(), gain * grad.double().cpu().sum((0, 2, 3))


def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    top: Tensor | None = None,
    mode: str = "nearest",
    gain: float = 1.0,
) -> Tensor:
    result = torch.einsum("nkyx,ok->noyx", feature.double().cpu(), weight.double().cpu().flatten(1))
    if bias is not None:
        result = result + bias.double().cpu().view(1, -1, 1, 1)
    return result if top is None else upsample_add(top, result, mode, gain)


def output_conv(feature: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    height, width = feature.shape[2:]
    padded = torch.nn.functional.pad(feature.double().cpu(), (1, 1, 1, 1))
    taps = weight.double().cpu()
    result = sum(
        torch.einsum("nkyx,ok->noyx", padded[:, :, dy : dy + height, dx : dx + width], taps[:, :, dy, dx])
        for dy in range(3)
        for dx in range(3)
    )
    assert isinstance(result, Tensor)
    return result if bias is None else result + bias.double().cpu().view(1, -1, 1, 1)


def output_conv_backward_weight(grad: Tensor, feature: Tensor, wants_bias: bool = True) -> tuple[Tensor, Tensor]:
    """The gradients of the weight and of the bias."""
    height, width = feature.shape[2:]
    padded = torch.nn.functional.pad(feature.double().cpu(), (1, 1, 1, 1))
    wide = grad.double().cpu()
    taps = [
        torch.einsum("noyx,nkyx->ok", wide, padded[:, :, dy : dy + height, dx : dx + width])
        for dy in range(3)
        for dx in range(3)
    ]
    return torch.stack(taps, -1).unflatten(-1, (3, 3)), wide.sum((0, 2, 3))


def fusion_factors(weights: Tensor, normalization: str = "relu", eps: float = 1e-4) -> Tensor:
    """The weights of a weighted merge, normalised by the paper's formulas; "none" leaves them as they are."""
    weights = weights.double().cpu()
    if normalization == "none":
        return weights
    kept = weights.clamp(min=0) if normalization == "relu" else weights.exp()
    return kept / (kept.sum() + (eps if normalization == "relu" else 0))


def weighted_merge(
    inputs: Sequence[Tensor], factors: Tensor, mode: str = "nearest", dtype: torch.dtype | None = None
) -> Tensor:
    """The weighted sum; `factors` are normalised already, and may be differentiated like the inputs."""
    size = (inputs[0].shape[2], inputs[0].shape[3])
    resized = [x.double().cpu() if x.shape[2:] == size else resize(x, size, mode, dtype) for x in inputs]
    return sum(
        (factor * x for factor, x in zip(factors.double().cpu(), resized, strict=True)), torch.zeros(()).double()
    )


def within_rounding(result: Tensor, exact: Tensor, scale: Tensor | float = 1.0, roundings: int = 1) -> None:
    """Asserts each element within one rounding of the result (or so many) and a few of the sums behind it.

    Those are in float32 (float64 for float64), and `scale` is the sum of the absolute values of their terms.
    """
    assert torch.isfinite(result).all()
    sums = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32).eps
    # Below the smallest normal number the spacing no longer shrinks with the value.
    spacing = rounding(result.dtype) * exact.abs() * 1.001
    spacing = spacing + torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    bound = roundings * spacing + 8 * sums * scale
    excess = (result.detach().double().cpu() - exact).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float(excess.max())} more than rounding allows"


def error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN and infinity count as failed."""
    exact = exact.detach()
    difference = (result.detach().double().cpu() - exact).norm() / exact.norm().clamp(
        min=torch.finfo(torch.float64).tiny
    )
    return float(difference) if torch.isfinite(difference) else float("inf")


def rounding(dtype: torch.dtype) -> float:
    """The unit roundoff: the relative error of rounding once."""
    return torch.finfo(dtype).eps / 2


# Roundings that every implementation is due.  16-bit results round once.  In float32 the sum itself rounds, and its
# order is the implementation's own: two orders differ by more than a tenth where both err by one or two roundings.  In
# float64 the oracle has no more digits than the result, and its own error counts too.
_DUE = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 16}


def no_worse_than_eager(
    result: Tensor, eager: Tensor, exact: Tensor, *, sum_over_pixels_of: torch.dtype | None = None
) -> bool:
    """A convolution's error is never above 1.1 times eager's own in the same dtype, beyond the roundings due.

    A sum over all pixels of maps of a dtype may cancel, and has few results, of which eager may round one well by
    chance: it gets twice eager's error, and four times the roundings of that dtype.
    """
    dtype = sum_over_pixels_of or result.dtype
    factor, times = (2, 4) if sum_over_pixels_of else (1.1, 1)
    return error(result, exact) <= max(factor * error(eager, exact), times * _DUE[dtype] * rounding(dtype))
