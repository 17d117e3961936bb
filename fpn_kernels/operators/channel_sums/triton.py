"""`channel_sums` by Triton: the sum of each channel of a dense NHWC map, in two launches and always in one order.

Each program sums a run of pixels, some rows of 16-byte accesses at a time, in float32.  The second launch
(`upsample_add.kernels.sum_partials`) adds the partial sums, at most a few hundred per channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.gpu.launch import Launch
from fpn_kernels.gpu.tiles import TileConfig, fitting
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.channel_sums.call import ChannelSums
from fpn_kernels.operators.upsample_add.triton_backward import reduction

# Bytes per element -> tiles of pixels by channels, the longest first: four 16-byte accesses per thread, so that 64 KiB
# are in flight per SM with four programs on it.
TABLE = {
    2: (TileConfig(16, 256, 4), TileConfig(64, 64, 4), TileConfig(256, 16, 4)),
    4: (TileConfig(32, 64, 4), TileConfig(128, 16, 4)),
}

_CTAS_PER_SM = 4


def _refusal(call: ChannelSums) -> str | None:
    source = call.source
    reason = availability.tensor_refusal(source)
    if reason is None and not source.is_contiguous(memory_format=torch.channels_last):
        reason = "the kernel sums dense NHWC maps"
    if reason is None and source.shape[0] * source.shape[2] * source.shape[3] >= 2**30:
        reason = "2**30 pixels or more: the kernel counts them in int32"
    return reason


def _opt_in(call: ChannelSums) -> str | None:
    """The kernel was not measured by itself.

    PyTorch's sums took 141 us for the five of a neck of one image (44 MB: 0.3 TB/s), and 354 us for eight images (1.0
    TB/s).  `merge_backward`'s gather, which writes the same partial sums and a map, moved 1.3 and 2.2 TB/s.
    """
    return availability.unmeasured(call.source)


def _plan(call: ChannelSums) -> Callable[[ChannelSums], Tensor]:
    from fpn_kernels.operators.channel_sums import kernels

    source = call.source
    batch, channels, height, width = source.shape
    pixels, access = batch * height * width, geometry.alignment(source, 1, channels)
    config = fitting(TABLE[source.element_size()], channels, access)
    column_tiles = -(-channels // config.columns)
    most = max(1, _CTAS_PER_SM * geometry.sm_count(source) // column_tiles)
    # Each program has a whole number of tiles; the last one may have fewer, but has at least one.
    share = -(-pixels // (most * config.rows)) * config.rows
    programs = -(-pixels // share)
    add_up = Launch(
        kernels.sum_pixels,
        (programs, column_tiles),
        (pixels, channels, share),
        {
            "ACCESS": access,
            "WIDE": geometry.needs_int64(source),
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "num_warps": config.num_warps,
        },
        source,
    )
    reduce = reduction(source, programs)

    def run(call: ChannelSums) -> Tensor:
        source = call.source
        partials = torch.empty((programs, channels), dtype=torch.float32, device=source.device)
        result = source.new_empty(channels)
        add_up(source, partials)
        reduce(partials, result, 1.0)
        return result

    return run


CHANNEL_SUMS = dispatch.Implementation(autotune.planned(_plan), _refusal, _opt_in, optional=True)
