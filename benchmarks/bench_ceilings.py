"""What this machine can do at best: the speed of a copy, and the rate of large products in each dtype.

They run in the same process and under the same allocator as everything else, once before it and once after it (see
`conftest.py`); the report divides by the best that was seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Gauge
from benchmarks.options import DTYPES
from fpn_kernels import compatibility


def bench_copy(moment: str, harness: Gauge) -> None:
    """One read and one write of a buffer that no cache holds."""
    nbytes = {"cuda": 512 << 20, "cpu": 128 << 20}[harness.device.type] if not harness.tiny else 1 << 20
    source = torch.empty(nbytes // 4, dtype=torch.float32, device=harness.device).uniform_()
    target = torch.zeros_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    harness.ceiling("bandwidth", "copy", 2 * nbytes, copy)
    if not torch.equal(source, target):
        raise AssertionError("the copy did not copy")


def bench_matmul(moment: str, ceiling_dtype: str, harness: Gauge) -> None:
    """A square matrix product."""
    size = 8192 if harness.device.type == "cuda" else 1536
    if harness.tiny:
        size = 64
    elif harness.device.type == "cpu" and ceiling_dtype == "fp16":
        size = 256  # about 2 GFLOP/s where no instruction multiplies float16: 1536 took seconds
    a, b = _random(harness, ceiling_dtype, (size, size), (size, size))
    out = torch.empty_like(a)
    product = _tf32_alike(lambda: torch.mm(a, b, out=out))
    harness.ceiling(f"flops {ceiling_dtype}", "matrix product", 2 * size**3, product)


def bench_conv3x3(moment: str, ceiling_dtype: str, harness: Gauge) -> None:
    """A 3x3 aten, 256 to 256 channels, NHWC.

    On some CPUs it is the faster of the two: 293 against 215 GFLOP/s in float32 in one run on a 2-core AMD EPYC, whose
    convolutions and matrix products PyTorch takes from two libraries.
    """
    batch, height, width = (8, 200, 320) if harness.device.type == "cuda" else (1, 100, 160)
    if harness.tiny or (harness.device.type == "cpu" and ceiling_dtype == "fp16"):
        height, width = 8, 8
    feature, weight = _random(harness, ceiling_dtype, (batch, 256, height, width), (256, 256, 3, 3))
    amount = 2 * 9 * 256 * 256 * batch * height * width
    with torch.no_grad():
        harness.ceiling(
            f"flops {ceiling_dtype}", "3x3 convolution", amount, lambda: F.conv2d(feature, weight, padding=1)
        )


def _random(harness: Gauge, dtype: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random data: on a GPU the rate depends on it, through the power that the bits take."""
    made = [torch.randn(shape, device=harness.device).to(getattr(torch, DTYPES[dtype])) for shape in shapes]
    return [tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in made]


def _tf32_alike(product: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """PyTorch has two switches for TF32; the operators follow that of the convolutions, so the ceiling must too."""

    def call() -> Tensor:
        switch = torch.backends.cuda.matmul
        before = switch.allow_tf32
        switch.allow_tf32 = compatibility.tf32_is_allowed()
        try:
            return product()
        finally:
            switch.allow_tf32 = before

    return call
