"""The clocks: what a caller waits, and, on a GPU, what the device itself takes with its cache cold."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_CYCLES_PER_SECOND = 2e9  # of `torch.cuda._sleep`; at a lower clock rate the device merely sleeps longer


class Clock:
    """Times calls on one device. On a CPU there is nothing to wait for and nothing to flush.

    A CPU's caches are left as they are: the large maps of an image exceed them, and where a map fits, it does so in
    a network as well.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.cache_bytes = 0
        if self.on_gpu:
            self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
            self._filler = torch.empty(4 * self.cache_bytes, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def prepare(self) -> None:
        """Fills a GPU's L2 cache with something else, as the rest of a network would, and waits for that."""
        if self.on_gpu:
            self._filler.zero_()
            self.synchronize()

    def caller_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds until the call's result is there."""
        return self.host_and_caller_seconds(call)[1]

    def host_and_caller_seconds(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until the call returns, and until its result is there: on a CPU the same."""
        begin = time.perf_counter()
        call()
        returned = time.perf_counter()
        self.synchronize()
        return returned - begin, time.perf_counter() - begin

    def device_seconds(self, call: Callable[[], Any], queue_ahead: float) -> float:
        """Seconds between two events around the call on the device, the cache cold.

        The device first sleeps for `queue_ahead` seconds, in which the host launches all of the call: the gaps
        between launches, which at batch 1 are longer than the kernels, are the caller's time and not the device's.
        """
        self.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(queue_ahead * _CYCLES_PER_SECOND))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
