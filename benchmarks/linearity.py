"""`python -m benchmarks.linearity`: whether cost grows in proportion to pixels, over batches and over image areas.

Prints nanoseconds a fine pixel at each size, as a share of those at the whole image and batch 1, fused and eager
side by side: 1.00 is linear.  The map is C3 of an 800 x 1280 image, 256 channels; small maps fit a cache and fixed
costs weigh more on them, so some distance from 1 is the machine's, and eager's column shows how much.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from benchmarks import options
from benchmarks.allocator import keep_pages
from benchmarks.clock import Clock
from fpn_kernels import reference

CHANNELS = 256
WHOLE = (100, 160)
# (batch, height, width): batches of whole images, then one image at a quarter, half and the whole of its area.
BATCHES = [(batch, *WHOLE) for batch in (1, 2, 4, 8)]
AREAS = [(1, 50, 80), (1, 50, 160), (1, *WHOLE)]

Size = tuple[int, int, int]
Call = Callable[[], Any]


def calls(size: Size, dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, dict[str, Call]]:
    """Operator to side ("fused", "eager") to call, on fresh random maps."""
    batch, height, width = size
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format

    def values(*shape: int) -> Tensor:
        made = torch.randn(shape, device=device).to(dtype)
        return made.contiguous(memory_format=memory_format) if len(shape) == 4 else made

    top, fine = values(batch, CHANNELS, height // 2, width // 2), values(batch, CHANNELS, height, width)
    weight, bias = values(CHANNELS, CHANNELS) / CHANNELS**0.5, values(CHANNELS)
    sides: dict[str, Any] = {"fused": fpn_kernels, "eager": reference}
    return {
        "upsample_add": {side: partial(m.upsample_add, top, fine) for side, m in sides.items()},
        "lateral_connection": {
            side: partial(m.lateral_connection, fine, weight, bias, top) for side, m in sides.items()
        },
    }


def seconds(measured: Sequence[Call], clock: Clock, rounds: int) -> list[float]:
    """The median of each call, the calls taken in turn so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in measured]
    for _ in range(rounds + 1):
        for call, taken in zip(measured, times, strict=True):
            clock.prepare()
            taken.append(clock.caller_seconds(call))
    return [statistics.median(taken[1:]) for taken in times]


def table(sizes: Sequence[Size], dtype: str, layout: str, device: torch.device, rounds: int) -> list[str]:
    """A line an operator: cost a pixel at each size over that at WHOLE, fused and eager."""
    clock = Clock(device)
    prepared = [calls(size, getattr(torch, options.DTYPES[dtype]), layout, device) for size in sizes]
    lines = []
    for operator in prepared[0]:
        cells = [f"{operator:<20}{dtype} {layout}"]
        measured = [each[operator][side] for each in prepared for side in ("fused", "eager")]
        taken = seconds(measured, clock, rounds)
        costs = [t / (b * h * w) for t, (b, h, w) in zip(taken, [s for s in sizes for _ in range(2)], strict=True)]
        reference_place = 2 * sizes.index((1, *WHOLE))
        for place in range(0, len(costs), 2):
            fused, eager = (costs[place + side] / costs[reference_place + side] for side in (0, 1))
            cells.append(f"{fused:5.2f} ({eager:.2f})")
        lines.append("  ".join(cells))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linearity", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=options.dtypes, default=("fp32", "bf16"))
    parser.add_argument("--layout", type=options.layouts, default=options.LAYOUTS)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    keep_pages()
    with torch.no_grad():
        for title, sizes in (("batch", BATCHES), ("area", AREAS)):
            heads = [str(size[0]) if title == "batch" else f"{size[1]}x{size[2]}" for size in sizes]
            print(f"\ncost a pixel by {title}, over that at batch 1, {WHOLE[0]}x{WHOLE[1]}: fused (eager)")
            print(f"{'':<29}" + "  ".join(f"{head:>12}" for head in heads))
            for dtype in chosen.dtype:
                for layout in chosen.layout:
                    print("\n".join(table(sizes, dtype, layout, device, chosen.rounds)), flush=True)


if __name__ == "__main__":
    main()
