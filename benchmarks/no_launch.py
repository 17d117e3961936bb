"""A Triton driver that compiles for sm_90 and launches nothing, for machines without a GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from benchmarks.internals import availability, dispatch, geometry, plan_cache, tf32_is_allowed

# Triton caches compiled kernels per device: each driver is a device number of its own.
_DEVICES = itertools.count(2000)


class Driver:
    """Replaces Triton's driver: compiles for sm_90 and records each launch.

    Attributes:
        launched: name, grid and arguments of each launch.
        scratch: the addresses of the scratch memory of the launches.
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
                    # As Triton's own launcher does.
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
        return {"max_shared_mem": 232448}  # of sm_90

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 2, 100, 0, 1024  # module, function, registers, spills, threads


@contextlib.contextmanager
def driver(*, keep: bool = True) -> Iterator[Driver]:
    """Replaces Triton's driver inside the block; with `keep`, launches are recorded with their tensors."""
    import triton

    stand_in = Driver(keep=keep)
    with mock.patch.object(triton.runtime.driver, "_active", stand_in):
        yield stand_in


def _arithmetic_on_a_gpu(feature: Any) -> str:
    """As `geometry.arithmetic_of` answers for a CUDA tensor."""
    if feature.element_size() == 2:
        return "half"
    return "tf32" if tf32_is_allowed() else "ieee"


@contextlib.contextmanager
def triton_serves_the_cpu(*, keep: bool = True) -> Iterator[Driver]:
    """Inside the block the backend "triton" accepts CPU tensors as if they were on a GPU; no result is written."""
    plan_cache.clear()
    try:
        with (
            driver(keep=keep) as stand_in,
            mock.patch.object(availability, "tensor_refusal", lambda tensor: None),
            mock.patch.object(geometry, "arithmetic_of", _arithmetic_on_a_gpu),
            mock.patch.dict(dispatch.BACKENDS, {"triton": lambda: None}),
            dispatch.use_backend("triton"),
        ):
            yield stand_in
    finally:
        plan_cache.clear()
