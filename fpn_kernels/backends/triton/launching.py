"""A launch put together once, and repeated for every call that is alike.

What a kernel is launched with, apart from its tensors, follows from their shapes, strides, dtypes and alignment alone.
`serving` remembers what was prepared for a call by just these; what an operator's `prepare` returns here launches by
`Launch`, which hands the compiled kernel its arguments without having Triton bind and specialise them anew.  That took
20 of the 61 us that `lateral_connection` cost its caller before a kernel was on its way, and finding the arguments most
of the rest (one core of an Intel Xeon; a driver that does nothing in the GPU's place).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends.triton.eligibility import INTERPRETED


@dataclasses.dataclass(frozen=True)
class Link:
    """A launch's place among launches that overlap: programmatic dependent launch, on compute capability 9.0 and later.

    Attributes:
        follows: it begins as soon as every program of the launch before it has called `device.begin_next`.  Until
            `device.await_previous` returns it may read only what was there before that launch, and write nothing:
            so its results may lie in memory that the launch before still reads.  What it needs of its own before
            then (descriptors, packed weights) may not, and is kept until all of them are on their way.
        leads: the next launch follows it.
    """

    follows: bool = False
    leads: bool = False

    def constants(self) -> dict[str, Any]:
        # The interpreter takes no option that it does not know.
        pdl = {"launch_pdl": True} if self.follows and not INTERPRETED else {}
        return {"FOLLOWS": self.follows, "LEADS": self.leads, **pdl}


ALONE = Link()


class Launch:
    """A kernel, its grid, and all arguments but the leading ones.

    Args:
        kernel: a `triton.jit` function, its arguments in the order: those of the call, `numbers`, `constants`.
        grid: how many programs, along up to three axes.
        numbers: the run-time arguments that every call shares.
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
        """Launches on the current stream; `leading` are the tensors, and numbers that each call has of its own."""
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
    """A result as `layouts.allocate` will make it, without memory: for its strides, and aligned as that is."""
    return torch.empty(shape, dtype=like.dtype, device="meta", memory_format=memory_format)
