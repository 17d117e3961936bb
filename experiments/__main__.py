"""Time each candidate for `lateral_connection` against the kernel that serves: `python -m experiments`.

Exit status: 0; 1 if a candidate is wrong, or in a dry run spills; 2 if this machine cannot run the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from fpn_kernels import resampling
from fpn_kernels.gpu import availability
from fpn_kernels.gpu.launch import stand_in
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.lateral_connection.triton import LATERAL_CONNECTION

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OUT_CHANNELS = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: input channels, size of the feature, size of the coarser map; `transposed`: the weight is [Cin, Cout]."""

    name: str
    in_channels: int
    size: tuple[int, int]
    top: tuple[int, int] | None
    transposed: bool = False

    def call(self, batch: int, layout: str, dtype: torch.dtype, device: str) -> LateralConnection:
        def values(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        feature = values(batch, self.in_channels, *self.size).contiguous(memory_format=FORMATS[layout])
        weight = values(_OUT_CHANNELS, self.in_channels) / self.in_channels**0.5
        if self.transposed:
            return LateralConnection(feature, weight.t().contiguous().t()[:, :, None, None], None, None)
        top = None
        if self.top is not None:
            top = values(batch, _OUT_CHANNELS, *self.top).contiguous(memory_format=FORMATS[layout])
        return LateralConnection(feature, weight[:, :, None, None], values(_OUT_CHANNELS), top)


# The levels of an image of 800 x 1280; C2 of an image of 600 x 900, whose coarser map does not have half the size; and
# the gradient of C2's feature.
CASES = [
    Case("C2", 256, (200, 320), (100, 160)),
    Case("C3", 512, (100, 160), (50, 80)),
    Case("C4", 1024, (50, 80), (25, 40)),
    Case("C5", 2048, (25, 40), None),
    Case("C2-odd", 256, (150, 225), (75, 113)),
    Case("C2-gradient", 256, (200, 320), None, transposed=True),
]

Run = Callable[[], Tensor]


def candidates(call: LateralConnection) -> Iterator[tuple[str, Run]]:
    """The tiles that fit a call, and a function that computes the call with each."""
    from experiments.descriptors import launch as descriptors
    from experiments.stationary import launch as stationary

    operands = (call.feature, call.matrix(), call.bias, call.top)
    like = stand_in(call.shape(), call.feature, call.out_format())
    for kernel in (descriptors, stationary):
        for config in kernel.candidates(*operands, like):
            launch = kernel.plan(config, *operands, like, call.mode)

            def run(launch: Callable[..., Any] = launch) -> Tensor:
                out = call.allocate()
                launch(*operands, out, call.gain)
                return out

            yield str(config), run


def exact(call: LateralConnection) -> Tensor:
    """The result in float64."""
    result = torch.einsum("nkyx,ok->noyx", call.feature.double(), call.matrix().double())
    if call.bias is not None:
        result += call.bias.double()[:, None, None]
    if call.top is not None:
        y, x = (
            resampling.source_index(call.top.shape[dim], call.feature.shape[dim], call.mode, call.feature.device)
            for dim in (2, 3)
        )
        result = call.gain * (result + call.top.double()[:, :, y][..., x])
    return result


def _error(result: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm."""
    return float((result.double() - expected).norm() / expected.norm())


def _print(*columns: Any) -> None:
    name, kernel, *rest = map(str, columns)
    print(f"{name:<24} {kernel:<40}", *(f"{column:>10}" for column in rest), flush=True)


def time_all(calls: Iterable[tuple[str, LateralConnection]]) -> int:
    """Print one row per call and kernel; each candidate is checked before it is timed."""
    from triton import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    wrong = 0
    _print("call", "kernel", "ms", "ratio", "error")
    for name, call in calls:
        expected = exact(call)
        arguments = (call.feature, call.weight, call.bias, call.top)
        with fpn_kernels.use_backend("triton"):
            explanation = fpn_kernels.explain("lateral_connection", *arguments)
            error_served = _error(fpn_kernels.lateral_connection(*arguments), expected)
            served = do_bench(lambda: fpn_kernels.lateral_connection(*arguments), return_mode="median")  # noqa: B023
        _print(
            name, f"serves: {explanation.kernel or explanation.backend}", f"{served:.4f}", "1.00", f"{error_served:.1e}"
        )
        for kernel, run in candidates(call):
            try:
                error = _error(run(), expected)
                milliseconds = do_bench(run, return_mode="median")
            except (OutOfResources, CompilationError) as problem:
                _print(name, kernel, type(problem).__name__)
                continue
            is_wrong = not error <= 2 * error_served
            wrong += is_wrong
            ratio = f"{milliseconds / served:.2f}"
            _print(name, kernel, f"{milliseconds:.4f}", ratio, f"{error:.1e}", *["WRONG"] * is_wrong)
    return int(wrong > 0)


def compile_all(calls: Iterable[tuple[str, LateralConnection]]) -> int:
    """Plan and compile each kernel for sm_90, and print its registers, shared memory and accesses of local memory."""
    from experiments.no_launch import no_launch

    spilled = 0
    _print("call", "kernel", "registers", "shared", "spills")
    for name, call in calls:
        with no_launch() as driver:
            serving = (f"serves: {LATERAL_CONNECTION.kernel(call) or 'triton'}", LATERAL_CONNECTION.plan(call))
            for kernel, run in (serving[0], lambda: serving[1](call)), *candidates(call):  # noqa: B023
                driver.launched.clear()
                run()
                for binary in driver.launched:
                    registers, spills = binary.usage()
                    spilled += spills
                    _print(name, f"{kernel}, {binary.name}", registers, binary.shared, spills)
    return int(spilled > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="compile for sm_90 without a GPU, and launch nothing")
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], default=None)
    parser.add_argument("--layout", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    problem = None
    if availability.INTERPRETED:
        problem = "unset TRITON_INTERPRET: the interpreter compiles nothing"
    elif not options.dry_run:
        problem = availability.unavailable()
    if problem is not None:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = "cpu" if options.dry_run else "cuda"
    chosen = [case for case in CASES if options.case is None or case.name in options.case]
    calls = (
        (f"{case.name} {layout} x{batch}", case.call(batch, layout, DTYPES[options.dtype], device))
        for batch, layout, case in itertools.product(options.batch, options.layout, chosen)
    )
    return (compile_all if options.dry_run else time_all)(calls)


if __name__ == "__main__":
    sys.exit(main())
