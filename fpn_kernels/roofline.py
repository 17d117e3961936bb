"""The minimal work of each operator, and the time of that work at best.

Each function returns a `Cost`: the operations, and the bytes that cross the memory interface if each input is read
once, each result is written once and nothing else moves.  `Cost.floor` converts it to seconds for the measured
ceilings of a machine.  A benchmark compares its measured time with this floor.

Conventions:

- `feature` is `(N, Cin, H, W)`, an output `(N, Cout, H, W)`, the size of a top `(h, w)`;
- a multiply-add counts as two operations.  In the convolutions only multiply-adds count: adding the bias and the top
  is 1 / (2 Cin) of them, and on a GPU the rate of the tensor cores does not apply to it;
- parameters (weights and biases) and their gradients are counted;
- the interpolation weights of the resize are not counted, so that the figure is a lower bound in every mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = Sequence[int]


@dataclass(frozen=True)
class Cost:
    """Bytes moved and operations.  Costs add; the floor of a sum is that of one pass over all of it."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bandwidth: float, flop_rate: float) -> float:
        """Seconds at best, for `bandwidth` in bytes/s and `flop_rate` in operations/s, if both overlap perfectly."""
        if not (bandwidth > 0 and flop_rate > 0):
            raise ValueError(f"bandwidth and flop_rate must be above 0, got {bandwidth!r} and {flop_rate!r}")
        return max(self.bytes / bandwidth, self.flops / flop_rate)


def _numel(shape: Shape) -> int:
    return math.prod(map(int, shape))


def _top_read(lateral: Shape, top_size: Shape) -> int:
    """Elements of top that nearest upsampling reads: N C min(h, H) min(w, W).

    This is all of it, unless the "top" is the finer map.
    """
    n, c, height, width = lateral
    return n * c * min(top_size[0], height) * min(top_size[1], width)


def upsample_add(lateral: Shape, top_size: Shape, dtype: torch.dtype, *, gain: float = 1.0) -> Cost:
    """Read lateral and top, write the sum: (2 N C H W + N C h w) elements; one addition per element.

    A gain other than 1 costs one multiplication per element and no byte.
    """
    count = _numel(lateral)
    flops = count if gain == 1.0 else 2 * count
    return Cost((2 * count + _top_read(lateral, top_size)) * dtype.itemsize, flops)


def upsample_add_backward(lateral: Shape, top_size: Shape, dtype: torch.dtype, *, gain: float = 1.0) -> Cost:
    """Read grad, write grad_top: (N C H W + N C h w) elements; one addition per element of grad.

    With gain 1 the gradient of lateral is grad itself and moves nothing; otherwise it adds N C H W elements.
    """
    count, coarse = _numel(lateral), _numel([*lateral[:2], *top_size])
    if gain == 1.0:
        return Cost((count + coarse) * dtype.itemsize, count)
    return Cost((2 * count + coarse) * dtype.itemsize, 2 * count)


def _factors(count: int, dtype: torch.dtype) -> int:
    """Bytes of one factor per map, in float32 (float64 for float64 maps)."""
    return count * max(4, dtype.itemsize)


def weighted_merge(first: Shape, other_sizes: Sequence[Shape], dtype: torch.dtype) -> Cost:
    """Read all maps and the factors, write the sum; per element, one product per map and the additions."""
    count, maps = _numel(first), 1 + len(other_sizes)
    elements = 2 * count + sum(_top_read(first, size) for size in other_sizes)
    return Cost(elements * dtype.itemsize + _factors(maps, dtype), (2 * maps - 1) * count)


def weighted_merge_backward(first: Shape, other_sizes: Sequence[Shape], dtype: torch.dtype) -> Cost:
    """Read grad, all maps and the factors, write the gradients of maps and factors.

    Per element of a map, three operations (its gradient; a product and a sum for the gradient of the factor).  Per
    element of grad, one addition for each resized map.
    """
    n, c = first[:2]
    own = [_numel(first), *(n * c * _numel(size) for size in other_sizes)]
    resized = sum(tuple(size) != tuple(first[2:]) for size in other_sizes)
    moved = (own[0] + 2 * sum(own)) * dtype.itemsize + 2 * _factors(len(own), dtype)
    return Cost(moved, 3 * sum(own) + resized * own[0])


def lateral_connection(
    feature: Shape, out_channels: int, top_size: Shape | None, dtype: torch.dtype, *, bias: bool = True
) -> Cost:
    """Read feature, weight, bias and top, write the result; 2 N H W Cin Cout operations.

    Bytes: N H W (Cin + Cout) + Cin Cout + Cout + N Cout h w elements.
    """
    n, cin, height, width = feature
    out = (n, out_channels, height, width)
    elements = _numel(feature) + _numel(out) + cin * out_channels + (out_channels if bias else 0)
    if top_size is not None:
        elements += _top_read(out, top_size)
    return Cost(elements * dtype.itemsize, 2 * n * height * width * cin * out_channels)


def lateral_connection_backward(
    feature: Shape,
    out_channels: int,
    top_size: Shape | None,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    feature_grad: bool = True,
) -> Cost:
    """Read grad, feature and weight, write their gradients and those of top and bias.

    Two matrix products of the forward's size, grad_feature = W^T grad and grad_weight = grad feature^T:
    4 N H W Cin Cout operations.  `feature_grad=False` is a frozen backbone: one product, and weight is not read.
    """
    n, cin, height, width = feature
    weight = cin * out_channels
    elements = n * out_channels * height * width + _numel(feature) + weight  # grad, feature; grad_weight
    elements += out_channels if bias else 0
    if top_size is not None:
        elements += n * out_channels * _numel(top_size)
    product = 2 * n * height * width * cin * out_channels
    if not feature_grad:
        return Cost(elements * dtype.itemsize, product)
    return Cost((elements + weight + _numel(feature)) * dtype.itemsize, 2 * product)


def output_conv(feature: Shape, out_channels: int, dtype: torch.dtype, *, bias: bool = True) -> Cost:
    """Read feature, weight and bias, write the result; 18 N H W Cin Cout operations (3x3, stride 1, padding 1).

    As usual, the products with padding are counted: about 6 (H + W) of 9 H W.
    """
    n, cin, height, width = feature
    elements = n * (cin + out_channels) * height * width + 9 * cin * out_channels + (out_channels if bias else 0)
    return Cost(elements * dtype.itemsize, 18 * n * height * width * cin * out_channels)


def output_conv_backward(feature: Shape, out_channels: int, dtype: torch.dtype, *, bias: bool = True) -> Cost:
    """Read grad, feature and weight, write their gradients and that of bias; twice the forward's operations."""
    n, cin, height, width = feature
    elements = n * (out_channels + 2 * cin) * height * width + 18 * cin * out_channels
    elements += out_channels if bias else 0
    return Cost(elements * dtype.itemsize, 36 * n * height * width * cin * out_channels)


def _parameters(features: Sequence[Shape], out_channels: int, *, bias: bool) -> int:
    """Elements of the 1x1 weights and their biases."""
    return sum(shape[1] * out_channels + (out_channels if bias else 0) for shape in features)


def _merged(features: Sequence[Shape], out_channels: int) -> int:
    """Elements of M2..M5, and also of P2..P5: one map of `out_channels` per feature."""
    return sum(_numel([shape[0], out_channels, *shape[2:]]) for shape in features)


def top_down_pathway(features: Sequence[Shape], out_channels: int, dtype: torch.dtype, *, bias: bool = True) -> Cost:
    """Read all features and parameters, write all merged maps; no merged map is read again as a top."""
    elements = sum(map(_numel, features)) + _parameters(features, out_channels, bias=bias)
    elements += _merged(features, out_channels)
    flops = sum(lateral_connection(shape, out_channels, None, dtype).flops for shape in features)
    return Cost(elements * dtype.itemsize, flops)


def top_down_pathway_backward(
    features: Sequence[Shape], out_channels: int, dtype: torch.dtype, *, bias: bool = True
) -> Cost:
    """Read the gradients of all merged maps, all features and weights; write the gradients of the last two.

    The gradient from one level to the next coarser one is not counted: a single pass keeps it on chip.
    """
    parameters = _parameters(features, out_channels, bias=bias)
    weights = _parameters(features, out_channels, bias=False)
    elements = _merged(features, out_channels) + 2 * sum(map(_numel, features)) + parameters + weights
    flops = sum(lateral_connection_backward(shape, out_channels, None, dtype).flops for shape in features)
    return Cost(elements * dtype.itemsize, flops)


def neck(features: Sequence[Shape], out_channels: int, dtype: torch.dtype, *, pool: bool = True) -> Cost:
    """The forward of the neck with biases: read C2..C5 and parameters, write P2..P5 (and P6, if `pool`).

    The merged maps are not counted: they may stay on chip.  P6 is every second pixel of P5, so it adds
    N C ceil(H5 / 2) ceil(W5 / 2) elements written.
    """
    pathway = top_down_pathway(features, out_channels, dtype)
    outputs = [output_conv([s[0], out_channels, *s[2:]], out_channels, dtype) for s in features]
    total = sum(outputs, start=pathway)
    on_chip = 2 * _merged(features, out_channels)  # written by the pathway, read by the output convolutions
    return Cost(total.bytes + (_pooled(features, out_channels, pool) - on_chip) * dtype.itemsize, total.flops)


def neck_backward(features: Sequence[Shape], out_channels: int, dtype: torch.dtype, *, pool: bool = True) -> Cost:
    """The backward of the neck: read grad P, M, C and the weights, write grad C and the gradients of the parameters.

    The merged maps are read, because the gradient of a 3x3 weight needs them; their gradients stay on chip.
    """
    pathway = top_down_pathway_backward(features, out_channels, dtype)
    outputs = [output_conv_backward([s[0], out_channels, *s[2:]], out_channels, dtype) for s in features]
    total = sum(outputs, start=pathway)
    on_chip = 2 * _merged(features, out_channels)  # grad M, written by the output convolutions, read by the pathway
    return Cost(total.bytes + (_pooled(features, out_channels, pool) - on_chip) * dtype.itemsize, total.flops)


def neck_forward_backward(
    features: Sequence[Shape], out_channels: int, dtype: torch.dtype, *, pool: bool = True
) -> Cost:
    """A training step of the neck: forward, backward, and one write of the merged maps."""
    kept = Cost(_merged(features, out_channels) * dtype.itemsize, 0)
    forward = neck(features, out_channels, dtype, pool=pool)
    return forward + kept + neck_backward(features, out_channels, dtype, pool=pool)


def _pooled(features: Sequence[Shape], out_channels: int, pool: bool) -> int:
    """Elements of P6, every second pixel of the coarsest map."""
    n, _, height, width = features[-1]
    return n * out_channels * ((height + 1) // 2) * ((width + 1) // 2) if pool else 0
