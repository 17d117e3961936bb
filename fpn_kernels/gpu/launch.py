"""A launch that is built once and repeated for every call with the same cache key.

The arguments of a kernel, apart from its tensors, follow from their shapes, strides, dtypes and alignment alone, which
are the cache key of a plan.  `Launch` passes them to the compiled kernel without Triton's binding and specialising.
That took 20 of the 61 us that `lateral_connection` cost its caller before the launch, and computing the arguments most
of the rest (one core of an Intel Xeon, with a driver that launches nothing).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.gpu.availability import INTERPRETED


@dataclasses.dataclass(frozen=True)
class Link:
    """The place of a launch in a chain of overlapping launches (programmatic dependent launch, from sm_90 on).

    Attributes:
        follows: this launch begins as soon as every program of the previous one has called
            `indexing.launch_dependents`.  Before `indexing.grid_dependency_wait` returns, it may read only memory that
            was written before the previous launch, and write nothing; its results may then reuse memory that the
            previous launch reads.  Buffers that it reads earlier (descriptors, packed weights) must not be reused, and
            are kept until all launches are queued.
        leads: the next launch follows this one.
    """

    follows: bool = False
    leads: bool = False

    def constants(self) -> dict[str, Any]:
        # The interpreter refuses options that it does not know.
        pdl = {"launch_pdl": True} if self.follows and not INTERPRETED else {}
        return {"FOLLOWS": self.follows, "LEADS": self.leads, **pdl}


ALONE = Link()


class Launch:
    """A kernel, its grid, and all arguments but the leading ones.

    Args:
        kernel: a `triton.jit` function, its arguments in the order: those of the call, `numbers`, `constants`.
        grid: the number of programs along up to three axes.
        numbers: the run-time arguments that all calls share.
        constants: the constexprs by name, and the options of the compilation (num_warps and the like).
        like: a tensor on the device of the launch.
    """

    __slots__ = ("_constants", "_device", "_grid", "_kernel", "_numbers", "_repeat", "_rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        constants: Mapping[str, Any],
        like: Tensor,
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._device = like.device if like.is_cuda else None
        self._repeat: Callable[..., None] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *leading: Any) -> None:
        """Launch on the current stream; `leading` are the tensors, and the numbers that differ between calls."""
        if self._device is None or self._device.index == torch.cuda.current_device():
            self._launch(leading)
        else:
            with torch.cuda.device(self._device):
                self._launch(leading)

    def _launch(self, leading: tuple[Any, ...]) -> None:
        if self._repeat is not None:
            self._repeat(*leading, *self._rest)
            return
        compiled = self._kernel[self._grid](*leading, *self._numbers, **self._constants)
        if compiled is None:
            return  # interpreted: there is nothing to repeat
        names = self._kernel.arg_names[len(leading) + len(self._numbers) :]
        self._rest = (*self._numbers, *(self._constants[name] for name in names))
        self._repeat = compiled[(*self._grid, 1, 1)[:3]]


def stand_in(shape: tuple[int, ...], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A result as `layouts.allocate` returns it, without memory, for its strides."""
    return torch.empty(shape, dtype=like.dtype, device="meta", memory_format=memory_format)
