"""The device code of `channel_sums`."""

# ruff: noqa: N803 - Triton's idiom: constexprs in capitals
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton.language as tl

from fpn_kernels.gpu.indexing import kernel, known_multiple, loop_bound, widened


@kernel(["pixels", "channels", "share"])
def sum_pixels(
    source, partials, pixels, channels, share,
    ACCESS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channels = known_multiple(channels, ACCESS)
    inside = c < channels
    first = program * share
    end = tl.minimum(first + share, pixels)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for pixel in range(loop_bound(first), loop_bound(end), ROWS):
        row = pixel + tl.arange(0, ROWS)
        place = widened(row, WIDE)[:, None] * channels + c[None, :]
        total += tl.load(source + place, mask=(row < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(partials + program.to(tl.int64) * channels + c, tl.sum(total, axis=0), mask=inside)
