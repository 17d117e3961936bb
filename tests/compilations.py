"""Compilations of real launches, for any chip and without a GPU.

Operators are planned and run on fake CUDA tensors, which have shapes, strides and a device but no memory.  Each launch
is recorded and compiled by Triton's own binder: a test reads exactly the code that the launch would run.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fpn_kernels import compatibility
from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.operators.operator import OPERATORS

# Plans hold the strides of results as tensors on the device "meta", which are not fake.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_POINTER = (FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size())


class Chip(NamedTuple):
    """Compute capability times ten, SMs, bytes of shared memory per CTA, pattern of the tensor cores' instructions."""

    capability: int
    sms: int
    shared_memory: int
    tensor_cores: str

    def __str__(self) -> str:
        return f"sm_{self.capability}"


A100 = Chip(80, 108, 163 * 1024, r"\bHMMA\.")
H100 = Chip(90, 132, 227 * 1024, r"\bHGMMA\.")
B200 = Chip(100, 148, 227 * 1024, r"\bUTC\w*MMA\b")
CHIPS = (A100, H100, B200)


class Call(NamedTuple):
    """A call of an operator by Triton.

    Attributes:
        dense: all maps are dense and 16 divides their counts, so that they are moved 16 bytes at a time.
        tf32: PyTorch's switch for float32 convolutions.
        candidates: launch every tile that `FPN_KERNELS_AUTOTUNE` measures for the call, before the one by heuristics.
    """

    operator: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = {}
    dense: bool = False
    tf32: bool = False
    candidates: bool = False


class Launched(NamedTuple):
    """A recorded launch."""

    chip: Chip
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self) -> Any:
        """The compiled kernel; equal specialisations give the same object."""
        assert all(0 < programs < 2**31 for programs in self.grid)
        with _patched(_POINTER, (driver, "_active", _driver(self.chip.capability))):
            return self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.constants)


def fake(channels: int, size: Sequence[int], layout: str, dtype: torch.dtype, batch: int = 2) -> Tensor:
    """A map whose layout is "nhwc" or "nchw", followed by any of "strided", "cropped" and "int64"."""
    height, width = size
    pitch = width + 16 if "cropped" in layout else width
    strides = [1, pitch * channels, channels] if "nhwc" in layout else [height * pitch, pitch, 1]
    strides = [2 * stride if "strided" in layout else stride for stride in strides]
    # Two images that lie 2**31 elements apart have offsets beyond int32.
    image = 2**31 if "int64" in layout else channels * height * pitch * (2 if "strided" in layout else 1)
    with FAKE:
        return torch.empty_strided((batch, channels, *size), (image, *strides), dtype=dtype, device="cuda:0")


def record(call: Call, chip: Chip) -> list[Launched]:
    """Plan the call and run the plan as on the chip; nothing is launched."""
    launched: list[Launched] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: launched.append(Launched(chip, kernel, grid, arguments, constants))

    operator = OPERATORS[call.operator]
    arguments, triton = operator.call(*call.arguments, **call.options), operator.backends["triton"]
    with _patched(
        (availability, "capability", lambda index: (chip.capability // 10, chip.capability % 10)),
        (geometry, "_sm_count", lambda index: chip.sms),
        (compatibility, "tf32_is_allowed", lambda: call.tf32),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (autotune, "ENABLED", call.candidates),
        (autotune, "fastest", _launch_all),
        _POINTER,
        (JITFunction, "__getitem__", launcher),
    ):
        arguments.check()
        assert triton.refusal(arguments) is None
        run = triton.plan(arguments)
        with FAKE:
            run(arguments)
    return launched


def _launch_all(operator: str, key: Any, tensor: Tensor, candidates: Any, default: Any, run: Any) -> Any:
    """Stands in for `autotune.fastest`, which launches the candidates to measure them."""
    with FAKE:
        for candidate in candidates:
            run(candidate)
    return default


def _driver(capability: int) -> Any:
    """Stands in for Triton's driver, so that its binder compiles for a chip that this machine does not have."""
    return types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        # Triton caches compilations by device number: one per chip that no real device has.
        get_current_device=lambda: 1000 + capability,
        get_current_stream=lambda device=None: 0,
    )


@contextlib.contextmanager
def _patched(*attributes: tuple[Any, str, Any]) -> Any:
    with contextlib.ExitStack() as patches:
        for owner, name, value in attributes:
            patches.enter_context(mock.patch.object(owner, name, value))
        yield
