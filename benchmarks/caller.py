"""`python -m benchmarks.caller`: host time per call, against eager PyTorch's.

Maps of a few pixels leave nothing to compute: the time is that of checks, dispatch, autograd and launches. On a GPU it
is the time until the call returns. With Triton and without a GPU, a second table has the Triton kernels behind a driver
that launches nothing (`no_launch`). Each time is the least of many, the calls taking turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from benchmarks import no_launch
from benchmarks.internals import INTERPRETED
from fpn_kernels import reference

CHANNELS = 16
# On a CPU PyTorch takes five times as long for a convolution of a few bfloat16 pixels: it reorders the weight first.
DTYPE = torch.float32
# A map of one pixel would be NHWC and NCHW at once.
SIDES = (16, 8, 4, 2)

Call = Callable[[], Any]
ROW = "{:<36}{:>10}{:>10}{:>8}"


def _operators(module: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """The public calls, on NHWC maps and weights."""

    def values(*shape: int) -> Tensor:
        made = torch.randn(shape, device=device).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    maps = [values(1, CHANNELS, side, side) for side in SIDES]
    weights = [values(CHANNELS, CHANNELS, 1, 1) for _ in SIDES]
    taps, bias = values(CHANNELS, CHANNELS, 3, 3), values(CHANNELS)
    return {
        "upsample_add": partial(module.upsample_add, maps[1], maps[0]),
        "lateral_connection": partial(module.lateral_connection, maps[0], weights[0], bias, maps[1]),
        "output_conv": partial(module.output_conv, maps[0], taps, bias),
        "top_down_pathway": partial(module.top_down_pathway, maps, weights, [bias] * len(maps)),
        "weighted_merge": partial(module.weighted_merge, [maps[0], maps[1]], torch.rand(2, device=device)),
    }


def _neck(module: Any, dtype: torch.dtype, device: torch.device, *, backward: bool) -> Call:
    network = module.FeaturePyramidNetwork([CHANNELS] * len(SIDES), CHANNELS)
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    maps = {str(n): torch.randn(1, CHANNELS, s, s, device=device).to(dtype) for n, s in enumerate(SIDES)}
    maps = {name: each.contiguous(memory_format=torch.channels_last) for name, each in maps.items()}
    if not backward:
        return lambda: network(maps)
    grads = {name: torch.randn_like(each) for name, each in maps.items()}

    def train() -> None:
        results = network(maps)
        torch.autograd.backward(list(results.values()), [grads[name] for name in results])

    return train


def calls(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Call, Call]]:
    """Name to fused and eager call."""
    fused, eager = (_operators(module, dtype, device) for module in (fpn_kernels, reference))
    pairs = {name: (fused[name], eager[name]) for name in fused}
    for name, backward in (("neck", False), ("neck, forward + backward", True)):
        pairs[name] = (
            _neck(fpn_kernels, dtype, device, backward=backward),
            _neck(reference, dtype, device, backward=backward),
        )
    return pairs


def least(measured: Sequence[Call], seconds: float, device: torch.device) -> list[float]:
    """The least seconds of each call; the calls take turns, three of each in a row as in a network."""
    times = [float("inf")] * len(measured)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for place, call in enumerate(measured):
            for _ in range(3):
                start = time.perf_counter()
                call()
                times[place] = min(times[place], time.perf_counter() - start)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return times


def table(title: str, names: Sequence[str], dtype: torch.dtype, device: torch.device, seconds: float) -> list[str]:
    """One line per call: us fused, us eager, and their ratio."""
    pairs = calls(dtype, device)
    lines = [ROW.format(title, "fused us", "eager us", "ratio")]
    for name in names:
        with torch.no_grad() if "backward" not in name else contextlib.nullcontext():
            for call in pairs[name]:
                call()  # compiles, and fills the plan cache
            fused, eager = least(pairs[name], seconds, device)
        lines.append(ROW.format(name, f"{fused * 1e6:.1f}", f"{eager * 1e6:.1f}", f"{eager / fused:.2f}"))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.caller", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each row")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    torch.set_num_threads(1)
    names = list(calls(DTYPE, device))
    lines = table(f"{device}, float32 NHWC", names, DTYPE, device, chosen.seconds)
    if device.type == "cpu" and importlib.util.find_spec("triton") and not INTERPRETED:
        with no_launch.triton_serves_the_cpu(keep=False):
            # No kernel writes its result here, which PyTorch's convolutions in a neck would read.
            operators = [name for name in names if not name.startswith("neck")]
            lines += ["", *table("Triton, nothing launched", operators, DTYPE, device, chosen.seconds)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
