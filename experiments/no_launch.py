"""A stand-in for Triton's driver: kernels are compiled for sm_90 without a GPU, and nothing is launched."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from fpn_kernels.gpu import geometry

# Triton caches compiled kernels per device: each stand-in is a device that no other launch uses.
_DEVICES = itertools.count(3000)


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel: its name, its machine code, and its shared memory in bytes."""

    name: str
    code: bytes
    shared: int

    def usage(self) -> tuple[int, int]:
        """The registers per thread, and the number of instructions that access local memory."""
        registers = max(map(int, re.findall(r"\bREG:(\d+)", self._dump("-res-usage"))))
        return registers, len(re.findall(r"\b(?:LDL|STL)\b", self.instructions()))

    def instructions(self) -> str:
        return self._dump("--dump-sass")

    def _dump(self, option: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "kernel.cubin")
            path.write_bytes(self.code)
            command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Driver:
    """Replaces Triton's driver; `launched` has the binary of each launch."""

    def __init__(self) -> None:
        launched: list[Binary] = []
        binaries: list[Binary] = []
        self.launched, self._device = launched, next(_DEVICES)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
                launched.append(binaries[function])

        class Utils:
            def get_device_properties(self, device: int) -> dict[str, int]:
                return {"max_shared_mem": 232448}  # Hopper's

            def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, ...]:
                binaries.append(Binary(name, code, shared))
                return 0, len(binaries) - 1, 0, 0, 1024  # module, function, registers, spills, threads

        self.launcher_cls, self.utils = Launcher, Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def no_launch() -> Iterator[Driver]:
    """Let CPU tensors be planned as on a GPU where TF32 is allowed; results are not written."""
    driver = Driver()

    def arithmetic_of(feature: torch.Tensor) -> str:
        return "tf32" if feature.dtype == torch.float32 else "half"

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(geometry, "arithmetic_of", arithmetic_of),
    ):
        yield driver
