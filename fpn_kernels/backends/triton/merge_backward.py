"""`merge_backward`: the gradients of the coarser map and of the bias in one pass over the gradient of the merge.

Every fine pixel's weights add up to 1, so the sum of what the coarse pixels gathered is the sum over all fine pixels:
the gather (`upsample_add_backward`) leaves float32 partial sums, a few hundred to a channel, and a second small kernel
adds them up in a fixed order.
"""

# ruff: noqa: N803 - Triton's idiom: constexprs in capitals, and a branch for each
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, result_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import geometry, launching
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.device import kernel, loop_bound, rounded
from fpn_kernels.backends.triton.upsample_add import TileConfig
from fpn_kernels.backends.triton.upsample_add_backward import AREA, gather, gather_variants, plan

# Partials at a time, channels: 32-byte runs, so that 256 channels still occupy 32 multiprocessors.
REDUCTION = TileConfig(256, 8, 4)


@kernel(["count", "channels"])
def sum_partials(partials, bias, gain, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < channels
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, loop_bound(count), ROWS):
        row = first + tl.arange(0, ROWS)
        # int64: areas leave one partial to a coarse pixel.
        place = row.to(tl.int64)[:, None] * channels + c[None, :]
        total += tl.load(partials + place, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    tl.store(bias + c, rounded(gain * tl.sum(total, axis=0), bias.dtype.element_ty), mask=inside)


def reduction(like: Tensor, count: int) -> launching.Launch:
    """What adds up so many partial sums a channel of a map; to be called with partials, bias and gain."""
    channels = like.shape[1]
    return launching.Launch(
        sum_partials,
        (-(-channels // REDUCTION.columns),),
        (count, channels),
        {"ROWS": REDUCTION.rows, "COLUMNS": REDUCTION.columns, "num_warps": REDUCTION.num_warps},
        like,
    )


@AtOnce
def merge_backward(
    grad: Tensor, top_size: tuple[int, int], own: Tensor | None, mode: str, gain: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    channels, shape, out_format = grad.shape[1], (*grad.shape[:2], *top_size), result_format(grad)
    new, like = allocator(shape, out_format), launching.stand_in(shape, grad, out_format)
    chosen = plan(grad, like, mode, bias=True)
    # An own gradient that lies in memory as the result does is read at the places that are written anyway.
    alike = own is not None and chosen.window != AREA and geometry.strides(own) == geometry.strides(like)
    adjoint = gather(chosen, grad, like, mode, bias=True, own=alike)
    reduce = reduction(grad, chosen.partials)

    def run(
        grad: Tensor, top_size: tuple[int, int], own: Tensor | None, mode: str, gain: float
    ) -> tuple[Tensor, Tensor]:
        out = new(grad)
        partials = torch.empty((chosen.partials, channels), dtype=torch.float32, device=grad.device)
        bias = grad.new_empty(channels)
        adjoint(grad, out, own if alike else out, partials, gain)
        reduce(partials, bias, gain)
        return out if own is None or alike else out.add_(own), bias

    return run


def variants() -> Iterator[Variant]:
    yield from gather_variants("merge_backward", bias=True)
    yield from gather_variants("merge_backward", bias=True, own=True)
    for size, kind in POINTER_TYPES.items():
        yield variant(
            sum_partials,
            {"partials": "*fp32", "bias": kind},
            ("gain",),
            {"ROWS": REDUCTION.rows, "COLUMNS": REDUCTION.columns},
            {"num_warps": REDUCTION.num_warps},
            f"merge_backward-sum_partials-{8 * size}bit",
            aligned=True,
        )
