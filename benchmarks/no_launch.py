"""Triton on a machine without a GPU, up to the launch: what the host does is done, and nothing is launched."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from fpn_kernels.operators import dispatch
from fpn_kernels.operators import plan_cache
from fpn_kernels.gpu import availability

# Triton remembers by device what it compiled: each stand-in is a device that no other launch may mean.
_DEVICES = itertools.count(2000)


class Driver:
    """Stands in Triton's driver's place: compiles for sm_90 and writes down each launch (name, grid, arguments).

    `scratch` has the addresses of the memory that the launches asked for.
    """

    def __init__(self, *, keep: bool = True) -> None:
        from triton.runtime import _allocation

        launched: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        scratch: list[int] = []
        self.launched, self.scratch = launched, scratch
        self.device = next(_DEVICES)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = metadata.name
                self.scratch = getattr(metadata, "global_scratch_size", 0) if keep else 0

            def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
                _stream, _function, _metadata, _launch_metadata, _enter, _exit, *arguments = rest
                if self.scratch:
                    # As Triton's launcher does, which keeps nothing of it either.
                    scratch.append(_allocation._allocator.get()(self.scratch, 128, 0).data_ptr())
                if keep:
                    launched.append((self.name, (x, y, z), tuple(arguments)))

        self.launcher_cls, self.utils = Launcher, _Utils()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}  # Hopper's, as the compiler for sm_90 counts on

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 2, 100, 0, 1024  # module, function, registers, spills, threads


@contextlib.contextmanager
def driver(*, keep: bool = True) -> Iterator[Driver]:
    """Within it Triton compiles and launches by a stand-in; where `keep`, launches are kept, tensors and all."""
    import triton

    stand_in = Driver(keep=keep)
    with mock.patch.object(triton.runtime.driver, "_active", stand_in):
        yield stand_in


@contextlib.contextmanager
def triton_serves_the_cpu(*, keep: bool = True) -> Iterator[Driver]:
    """Within it the backend "triton" takes CPU tensors as if they were a GPU's.  No result is ever written."""
    ours = dataclasses.replace(dispatch._registry["triton"], unavailable=lambda: None)
    plan_cache.clear()
    try:
        with (
            driver(keep=keep) as stand_in,
            mock.patch.object(availability, "_tensor_refusal", lambda tensor: None),
            mock.patch.dict(dispatch._registry, {"triton": ours}),
            dispatch.use_backend("triton"),
        ):
            yield stand_in
    finally:
        plan_cache.clear()
