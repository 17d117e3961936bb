"""`python -m benchmarks.caller`: what a call costs the thread that makes it, beside eager PyTorch's own.

Maps of a few pixels leave nothing to compute, so what is left is checks, selection, autograd and launches.  On a GPU
it is the time after which the call returns.  Where Triton is installed and no GPU is there, a second table has the
Triton kernels with a driver that launches nothing (`no_launch`): all that a launch costs but the launch itself, which
eager's column does not have either.  Each time is the least of many, in turn with the others.
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
from fpn_kernels import reference
from fpn_kernels.gpu import availability

CHANNELS = 16
# On a CPU a convolution of a few bfloat16 pixels takes PyTorch five times as long: it turns the weight about first.
DTYPE = torch.float32
# Of one pixel a map would be NHWC and NCHW at once.
SIDES = (16, 8, 4, 2)

Call = Callable[[], Any]
ROW = "{:<36}{:>10}{:>10}{:>8}"


def _operators(module: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """The public calls, on NHWC maps; weights lie as `module.to(memory_format=torch.channels_last)` leaves them."""

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
    """The least time of each call, taken in turn for so many seconds, three in a row as they meet in a network."""
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
    """A line a call: us fused, us eager, and how many times as fast."""
    pairs = calls(dtype, device)
    lines = [ROW.format(title, "fused us", "eager us", "ratio")]
    for name in names:
        with torch.no_grad() if "backward" not in name else contextlib.nullcontext():
            for call in pairs[name]:
                call()  # compiles, and prepares
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
    if device.type == "cpu" and importlib.util.find_spec("triton") and not availability.INTERPRETED:
        with no_launch.triton_serves_the_cpu(keep=False):
            # What a kernel does not write is not to be differentiated or convolved by others: operators alone.
            alone = [name for name in names if not name.startswith("neck")]
            lines += ["", *table("Triton, nothing launched", alone, DTYPE, device, chosen.seconds)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
