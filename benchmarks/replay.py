"""Time on a GPU by graph replay: the kernels alone, back to back, with their inputs out of the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A graph of at least this many seconds: what its launch adds at either end is then below a hundredth.
_SHORTEST = 1e-3
_MOST_CALLS = 64
# Caches' worths of memory that pass between two uses of the same input.
_CACHES = 4
_MOST_SETS = 16
_LAUNCH_CYCLES = 500_000  # of `torch.cuda._sleep`: a quarter of a millisecond, in which the host launches a replay


def input_sets(inputs: tuple[Tensor, ...], cache_bytes: int) -> list[tuple[Tensor, ...]]:
    """Copies of the inputs, as many as make a round over all of them several times larger than the cache.

    The inputs themselves are the first set. Each call then finds what it reads in memory and not in the cache, as in
    a network, where megabytes of other maps pass between the making of a map and its use.
    """
    footprint = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    count = min(_MOST_SETS, max(2, math.ceil(_CACHES * cache_bytes / max(1, footprint))))

    def copy(tensor: Tensor) -> Tensor:
        # preserve_format: strides as they are
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return [inputs, *(tuple(map(copy, inputs)) for _ in range(count - 1))]


class GraphTimer:
    """A CUDA graph of many calls, to be replayed between two events.

    Args:
        calls: the same computation on as many sets of inputs; they take turns.
        estimate: seconds that one call takes on the device, roughly.

    Raises:
        RuntimeError: the calls cannot be captured (one of them waits for the device, say).
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], estimate: float) -> None:
        rounds = math.ceil(_SHORTEST / max(estimate, 1e-7) / len(calls))
        self.count = len(calls) * max(1, min(rounds, _MOST_CALLS // len(calls)))
        # Results of one round of calls stay alive: a call that wrote where the last one wrote would find the lines in
        # the cache.
        self._results: list[Any] = [None] * len(calls)
        self._warm_up(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for index in range(self.count):
                turn = index % len(calls)
                self._results[turn] = None
                self._results[turn] = calls[turn]()
        for _ in range(2):  # the first uploads the graph
            self._graph.replay()
        torch.cuda.synchronize()

    @staticmethod
    def _warm_up(calls: Sequence[Callable[[], Any]]) -> None:
        """On a stream of its own, as a capture asks for: handles and workspaces are made here, a capture may not."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def seconds(self) -> float:
        """Seconds a call, over one replay.

        The device sleeps while the host launches: what the host takes is not counted.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_LAUNCH_CYCLES)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.count
