"""Many threads, forked workers, repeated imports, streams: the same bits each time."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from operators import PUBLIC
from samples import Make, Operator, of_tensors, random_map, tensors_of
from targets import INTERPRETED, Target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fpn_kernels
from fpn_kernels import functional

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter keeps one grid for the whole process")

THREADS, ROUNDS = 8, 6


def _job(op: Operator, device: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """An operator and its gradients, on values of its own."""
    arguments = op.samples[0].arguments(Make(dtype, device))
    function = of_tensors(op.call, arguments, op.samples[0].options)
    leaves = [tensor.requires_grad_() for tensor in tensors_of(arguments)]

    def compute() -> list[Tensor]:
        results = function(*leaves)
        return [*results, *torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])]

    return compute


def _jobs(device: str, dtype: torch.dtype, target: Target) -> Callable[[], list[Tensor]]:
    """All public operators that the target has."""
    jobs = [_job(op, device, dtype) for op in PUBLIC if target.has(op.name)]
    return lambda: [tensor for job in jobs for tensor in job()]


def _equal(results: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_compute_the_same_bits(dtype: torch.dtype, target: Target) -> None:
    """Each thread has values of its own: scratch memory or tables that two share would mix them."""
    target.require(dtype)
    failures: list[object] = []
    with fpn_kernels.use_backend(target.backend):
        jobs = [_jobs(target.device, dtype, target) for _ in range(THREADS)]
        expected = [job() for job in jobs]
        start = threading.Barrier(THREADS)

        def work(index: int) -> None:
            try:
                start.wait(timeout=60)
                for _ in range(ROUNDS):
                    if not _equal(jobs[index](), expected[index]):
                        failures.append(index)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads) and failures == []


def test_many_threads_make_the_first_call() -> None:
    """The first call loads the library and looks up its operators: here eight threads make it at once."""
    script = """
import threading, torch, fpn_kernels
top, lateral = torch.arange(6.).view(1, 1, 2, 3), torch.zeros(1, 1, 4, 6)
results, start = [], threading.Barrier(8)
def work():
    start.wait(60)
    results.append(fpn_kernels.upsample_add(top, lateral))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
expected = fpn_kernels.reference.upsample_add(top, lateral)
assert len(results) == 8 and all(torch.equal(r, expected) for r in results)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture
def threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_kept", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_runs_and_numbers_of_threads_do_not_show(layout: str, dtype: torch.dtype, target: Target) -> None:
    """Under `use_deterministic_algorithms`: nothing raises, and each run has the bits of the first.

    The merges with any number of threads; a convolution may be PyTorch's own, whose blocks depend on that number.
    """
    target.require(dtype)
    size, half = (45, 61), (23, 31)
    grad, other = (random_map((2, 12, *size), dtype, target.device, layout) for _ in range(2))
    top = random_map((2, 12, *half), dtype, target.device, layout)
    weight = random_map((12, 12, 1, 1), dtype, target.device)
    factors = torch.tensor([0.3, 0.5, 0.2], device=target.device)
    operators, runs = torch.ops.fpn_kernels, []
    with fpn_kernels.use_backend(target.backend):
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            merges = [
                fpn_kernels.upsample_add(top, grad, mode="bilinear"),
                fpn_kernels.weighted_merge([grad, top, other], factors),
                operators.upsample_add_backward(grad, half, mode="bilinear"),
            ]
            sums = [
                *operators.merge_backward(grad, half, top),
                *operators.weighted_merge_backward(grad, other, factors[0]),
                fpn_kernels.lateral_connection(grad, weight, None, top),
            ]
            runs.append((threads, merges, sums))
    first = runs[0]
    for threads, merges, sums in runs[1:]:
        assert _equal(merges, first[1])
        if threads == 1 or (target.backend == "native" and target.device == "cpu"):
            count = len(sums) if threads == 1 else len(sums) - 1
            assert _equal(sums[:count], first[2][:count])


class Merged(Dataset):
    """Merges in the worker that loads them."""

    def __init__(self, tops: Tensor, laterals: Tensor) -> None:
        self.tops, self.laterals = tops, laterals

    def __len__(self) -> int:
        return len(self.tops)

    def __getitem__(self, index: int) -> Tensor:
        top, lateral = self.tops[index : index + 1], self.laterals[index : index + 1]
        merged = fpn_kernels.upsample_add(top, lateral, mode="bilinear")
        return fpn_kernels.output_conv(merged, torch.ones(3, 3, 3, 3))[0]


# Python warns of any fork of a process with threads; this is the default context of a DataLoader on Linux.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_data_loader_workers() -> None:
    data = Merged(torch.randn(6, 3, 20, 30), torch.randn(6, 3, 40, 60))
    expected = [data[index] for index in range(len(data))]  # the parent has loaded and used everything before it forks
    loaded = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    for result, wanted in zip(loaded, expected, strict=True):
        # A worker has one thread: PyTorch's convolution may add up in another order.
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_imports_repeat() -> None:
    """The public modules may be reloaded, as notebooks do: the operators stay the ones that torch has."""
    top, lateral = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 8)
    before = fpn_kernels.upsample_add(top, lateral)
    script = """
import importlib, sys, torch
import fpn_kernels
x, y = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 8)
first = fpn_kernels.upsample_add(x, y)
for name in ("functional", "reference", "roi", "resampling"):
    importlib.reload(sys.modules["fpn_kernels." + name])
importlib.reload(fpn_kernels)
import fpn_kernels as again
assert again is fpn_kernels
assert torch.equal(again.upsample_add(x, y), first) and torch.equal(fpn_kernels.functional.upsample_add(x, y), first)
assert fpn_kernels.explain("upsample_add", x, y).backend
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)
    assert importlib.import_module("fpn_kernels") is fpn_kernels
    assert importlib.import_module("fpn_kernels.functional") is functional
    assert torch.equal(fpn_kernels.upsample_add(top, lateral), before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")  # nothing is accumulated
@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_several_cuda_streams(backend: str) -> None:
    """Each stream's work waits for what that stream made, and for nothing else."""
    # On a GPU the compiled library has the merge alone.
    target = Target(backend, "cuda", backend, ("upsample_add",) if backend == "native" else ())
    if target.unavailable():
        pytest.skip(f"{backend} is not available for this GPU")
    streams = [torch.cuda.Stream() for _ in range(4)]
    with fpn_kernels.use_backend(backend):
        jobs = [_jobs("cuda", torch.float32, target) for _ in streams]
        expected = [job() for job in jobs]
        torch.cuda.synchronize()
        for _ in range(5):
            results = []
            for stream, job in zip(streams, jobs, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(1_000_000)  # the kernels queue up behind it, in all streams at once
                    results.append(job())
            torch.cuda.synchronize()
            # ATen's own gradients of convolutions may add atomically; all else repeats itself.
            for result, wanted in zip(results, expected, strict=True):
                for ours, first in zip(result, wanted, strict=True):
                    torch.testing.assert_close(ours, first, rtol=1e-4, atol=1e-4)
