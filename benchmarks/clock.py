"""The clocks: until the call returns, until its result is there, and, on a GPU, the kernels alone with a cold cache."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

_CYCLES_PER_SECOND = 2e9  # of `torch.cuda._sleep`; at a lower clock rate the device sleeps longer
# A graph takes at least so many seconds: its launch then adds less than a hundredth.
_MIN_GRAPH_SECONDS = 1e-3
_MAX_GRAPH_CALLS = 64
_LAUNCH_SECONDS = 2.5e-4
# How many times the size of the cache passes between two uses of the same input, and the limit on copies for it.
_CACHES = 4
_MAX_SETS = 16

# From <malloc.h>. M_MMAP_THRESHOLD cannot do it: glibc caps it at 32 MB on 64-bit machines.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> str:
    """Makes glibc keep freed pages in this process; returns the outcome, for the report's header.

    By default a block of 32 MB or more is mapped at each allocation, and the page faults of a C2 map cost more than the
    work that is measured. A network that runs repeatedly under a caching allocator has none of them.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        version = libc.gnu_get_libc_version().decode()
        kept = libc.mallopt(_M_MMAP_MAX, 0) == 1 and libc.mallopt(_M_TRIM_THRESHOLD, -1) == 1
    except (AttributeError, OSError, TypeError):
        return "as found (not glibc): large CPU results may include page faults"
    if not kept:
        return f"as found (glibc {version} refused mallopt): large CPU results may include page faults"
    return f"glibc {version}, freed pages kept"


class Clock:
    """Times calls on one device. A CPU's caches are left as they are: a map that fits does so in a network, too."""

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
        """Fills a GPU's L2 cache with other data, and waits."""
        if self.on_gpu:
            self._filler.zero_()
            self.synchronize()

    def host_and_caller_seconds(self, call: Call) -> tuple[float, float]:
        """Seconds until the call returns, and until its result is there: on a CPU the same."""
        begin = time.perf_counter()
        call()
        returned = time.perf_counter()
        self.synchronize()
        return returned - begin, time.perf_counter() - begin

    def caller_seconds(self, call: Call) -> float:
        return self.host_and_caller_seconds(call)[1]

    def device_seconds(self, call: Call, queue_ahead: float) -> float:
        """Seconds between two events around the call, the cache cold.

        The device first sleeps for `queue_ahead` seconds, in which the host launches the call: the gaps between
        launches are the caller's time, not the device's.
        """
        self.prepare()
        return _between_events(call, queue_ahead)


def _between_events(call: Call, queue_ahead: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(queue_ahead * _CYCLES_PER_SECOND))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def input_sets(inputs: tuple[Tensor, ...], cache_bytes: int) -> list[tuple[Tensor, ...]]:
    """The inputs and copies of them; one round over all sets reads several times the size of the cache.

    Each call then reads its inputs from memory, as in a network.
    """
    footprint = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    count = min(_MAX_SETS, max(2, math.ceil(_CACHES * cache_bytes / max(1, footprint))))

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return [inputs, *(tuple(map(copy, inputs)) for _ in range(count - 1))]


class GraphTimer:
    """A CUDA graph of many calls, replayed between two events.

    Args:
        calls: the same computation on several sets of inputs, which take turns.
        estimate: seconds of one call on the device, roughly.

    Raises:
        RuntimeError: the calls cannot be captured (e.g. one of them waits for the device).
    """

    def __init__(self, calls: Sequence[Call], estimate: float) -> None:
        rounds = math.ceil(_MIN_GRAPH_SECONDS / max(estimate, 1e-7) / len(calls))
        self.count = len(calls) * max(1, min(rounds, _MAX_GRAPH_CALLS // len(calls)))
        # The results of one round stay alive: a call that wrote into the last result's memory would hit the cache.
        self._results: list[Any] = [None] * len(calls)
        self._warm_up(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for index in range(self.count):
                turn = index % len(calls)
                self._results[turn] = None
                self._results[turn] = calls[turn]()
        for _ in range(2):  # the first replay uploads the graph
            self._graph.replay()
        torch.cuda.synchronize()

    @staticmethod
    def _warm_up(calls: Sequence[Call]) -> None:
        """On a side stream, as a capture requires: a capture may create neither handles nor workspaces."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def seconds(self) -> float:
        """Seconds per call, over one replay."""
        return _between_events(self._graph.replay, _LAUNCH_SECONDS) / self.count
