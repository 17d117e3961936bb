"""Each operator, forward and backward, on the device against float64: right or wrong within seconds.

The tests' own oracle gives the resize by explicit indices; the rest of the float64 result is PyTorch's on the CPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fpn_kernels
from benchmarks.cases import Image
from benchmarks.harness import WrongResultError
from benchmarks.options import DTYPES
from benchmarks.providers import NotMeasuredError
from benchmarks.workloads import memory_format, tensors
from fpn_kernels import functional, reference
from fpn_kernels.operators.dispatch import BackendUnavailableError, record_calls

# Odd sizes, the paper's width: every kernel has its tail, and none of them takes a second in float64.
SMALL = Image("300x452", ((75, 113), (38, 57), (19, 29), (10, 15)), channels=(64, 128, 256, 512), out_channels=256)
TINY = Image("60x90", ((15, 23), (8, 12), (4, 6), (2, 3)), channels=(8, 16, 32, 64), out_channels=16)

# The promise of the library: a convolution's error is never above 1.1 times eager's own in the same dtype, or the
# roundings that every implementation is due: one in 16 bits, four in float32, where the order of a sum is free.
_AGAINST_EAGER = 1.1
_DUE = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4}
# A pyramid's results and gradients are rounded at every level on their way; a bias of the coarsest level, which has
# few pixels, shows it: errors of 1.00 and 1.05 roundings where eager's luck was better.
# The gradient of a weighted merge's coarser map is rounded after the adjoint and after the factor, that of its weights
# after each step of the normalisation.
_CHAINED = {"top_down_pathway": 4, "neck": 4, "weighted_merge": 4}

Call = Callable[[ModuleType, list[Tensor]], Any]


def _oracle() -> ModuleType:
    tests = str(Path(__file__).resolve().parents[2] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return importlib.import_module("oracle")


def _upsample_add(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    width = image.out_channels
    shapes: list[tuple[int, ...]] = [(2, width, *image.sizes[level]) for level in (1, 0)]
    return lambda functions, t: functions.upsample_add(t[0], t[1]), shapes


def _lateral_connection(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    width, cin = image.out_channels, image.channels[0]
    shapes = [(2, cin, *image.sizes[0]), (width, cin, 1, 1), (width,), (2, width, *image.sizes[1])]
    return lambda functions, t: functions.lateral_connection(*t), shapes


def _output_conv(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    width = image.out_channels
    shapes = [(2, width, *image.sizes[1]), (width, width, 3, 3), (width,)]
    return lambda functions, t: functions.output_conv(*t), shapes


def _output_conv_levels(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    width, sizes = image.out_channels, image.sizes[1:]
    count = len(sizes)
    shapes = [*((2, width, *size) for size in sizes), *[(width, width, 3, 3)] * count, *[(width,)] * count]

    def call(functions: ModuleType, t: list[Tensor]) -> Any:
        groups = t[:count], t[count : 2 * count], t[2 * count :]
        if functions is fpn_kernels:
            return functional.output_conv_levels(*groups)
        return [functions.output_conv(*level) for level in zip(*groups, strict=True)]

    return call, shapes


def _weighted_merge(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    width = image.out_channels
    shapes: list[tuple[int, ...]] = [(2, width, *image.sizes[0]), (2, width, *image.sizes[1]), (2,)]
    return lambda functions, t: functions.weighted_merge(t[:2], t[2].abs() + 0.5), shapes


def _pathway_shapes(image: Image) -> list[tuple[int, ...]]:
    width = image.out_channels
    features = [(1, channels, *size) for channels, size in zip(image.channels, image.sizes, strict=True)]
    return [*features, *((width, channels, 1, 1) for channels in image.channels), *((width,) for _ in features)]


def _top_down_pathway(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    return lambda functions, t: functions.top_down_pathway(t[:4], t[4:8], t[8:12]), _pathway_shapes(image)


def _neck(image: Image) -> tuple[Call, list[tuple[int, ...]]]:
    """The module, its parameters handed in, so that they can be those of float64."""
    width = image.out_channels
    outputs = [(width, width, 3, 3)] * 4 + [(width,)] * 4

    def call(functions: ModuleType, t: list[Tensor]) -> Any:
        module = functions.FeaturePyramidNetwork(list(image.channels), width)
        groups = {"inner_blocks": (t[4:8], t[8:12]), "layer_blocks": (t[12:16], t[16:20])}
        parameters = {
            f"{blocks}.{level}.0.{name}": values[level]
            for blocks, pair in groups.items()
            for name, values in zip(("weight", "bias"), pair, strict=True)
            for level in range(4)
        }
        features = {str(level): feature for level, feature in enumerate(t[:4])}
        return torch.func.functional_call(module.to(t[0].device), parameters, (features,))

    return call, _pathway_shapes(image) + outputs


_OPERATORS = {
    "upsample_add": _upsample_add,
    "lateral_connection": _lateral_connection,
    "output_conv": _output_conv,
    "output_conv_levels": _output_conv_levels,
    "top_down_pathway": _top_down_pathway,
    "weighted_merge": _weighted_merge,
    "neck": _neck,
}


def _inputs(shapes: list[tuple[int, ...]], dtype: str, layout: str, device: torch.device) -> list[Tensor]:
    """Fresh random values, made on the CPU; weights so scaled that a result is of the order of 1."""
    made = []
    for index, shape in enumerate(shapes):
        values = torch.randn(shape)
        is_weight = len(shape) == 4 and index > 0 and shape[2:] in ((1, 1), (3, 3))
        if is_weight:
            values = values / (shape[1] * shape[2] * shape[3]) ** 0.5
        values = values.to(getattr(torch, DTYPES[dtype]))
        if len(shape) == 4:
            values = values.contiguous(memory_format=memory_format(layout))
        made.append(values.to(device).requires_grad_())
    return made


@contextmanager
def _explicit_indices() -> Iterator[None]:
    """`reference` resizes by the oracle's explicit indices."""
    oracle, original = _oracle(), reference._resize
    reference._resize = lambda top, size, mode: oracle.resize(top, (size[0], size[1]), mode)
    try:
        yield
    finally:
        reference._resize = original


def _poison(device: torch.device) -> None:
    """NaN in the memory that the next allocations get, so that what a kernel leaves unwritten shows."""
    blocks = [torch.full((size,), float("nan"), device=device) for size in (1 << 14, 1 << 18, 1 << 22, 1 << 24)]
    del blocks


def _step(call: Call, functions: ModuleType, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results, then the gradients of every input."""
    results = tensors(call(functions, inputs))
    gradients = torch.autograd.grad(results, inputs, grads)
    return [*(result.detach() for result in results), *gradients]


def sample(operator: str, dtype: str, layout: str, backend: str, device: torch.device) -> dict[str, Any]:
    """Forward and backward once on a tiny map by one backend, with nothing else on the device; for a sanitizer."""
    call, shapes = _OPERATORS[operator](TINY)
    results, _ = _forced(call, _inputs(shapes, dtype, layout, device), backend)
    return {"finite": all(bool(torch.isfinite(result.cpu()).all()) for result in results)}


def _forced(call: Call, inputs: list[Tensor], backend: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """The library's results and gradients, its backend forced where one is named, and the cotangents behind them."""
    try:
        with fpn_kernels.use_backend(backend):
            results = tensors(call(fpn_kernels, inputs))
            # Made on the CPU: under a sanitizer nothing but the library's kernels is to run.
            grads = [
                torch.empty_like(result, requires_grad=False).copy_(torch.randn(result.shape)) for result in results
            ]
            gradients = torch.autograd.grad(results, inputs, grads)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    return [*(result.detach() for result in results), *gradients], grads


def check(
    operator: str, dtype: str, layout: str, backend: str | None, tiny: bool, device: torch.device
) -> dict[str, Any]:
    """Compares one operator, its results and gradients, with float64.

    Returns:
        `served_by`, and for the worst tensor `error` and `eager_error`, each relative in the Euclidean norm.

    Raises:
        NotMeasuredError: the backend is not here, or does not serve the operator.
        WrongResultError: an error is above what the library promises.
    """
    call, shapes = _OPERATORS[operator](TINY if tiny else SMALL)
    inputs = _inputs(shapes, dtype, layout, device)
    _poison(device)
    with record_calls() as calls:
        ours, grads = _forced(call, inputs, backend)
    eager = _step(call, reference, inputs, grads)
    exact_inputs = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    with _explicit_indices():
        exact = _step(call, reference, exact_inputs, [grad.double().cpu() for grad in grads])
    if operator == "upsample_add" and not torch.equal(ours[0].cpu(), exact[0].to(ours[0].dtype)):
        raise WrongResultError("result 0 is not the float64 sum, rounded once")
    worst = max(
        _judged(
            f"result {index}" if index < len(grads) else f"gradient of input {index - len(grads)}",
            *three,
            _CHAINED.get(operator, 1) * _cancelled(operator, index - len(grads), grads, three[2]),
        )
        for index, three in enumerate(zip(ours, eager, exact, strict=True))
    )
    served = {name: "+".join(dict.fromkeys(b for o, b in calls if o == name)) for name, _ in calls}
    return {"served_by": served, "error": worst[1], "eager_error": worst[2]}


def _cancelled(operator: str, place: int, grads: list[Tensor], exact: Tensor) -> float:
    """How much smaller than a sum of so many random products the gradient of a weighted merge's weights is.

    It is a difference of two such sums, each as large as the root of their number, and as exact as those are.
    """
    if operator != "weighted_merge" or place != 2:
        return 1.0
    size: float = grads[0].numel() ** 0.5
    return max(1.0, size / float(exact.norm()))


def _judged(name: str, ours: Tensor, eager: Tensor, exact: Tensor, chained: float) -> tuple[float, float, float]:
    """The error as a share of what is allowed, the error, and eager's; raises where it is above what is allowed."""
    oracle = _oracle()
    if (ours.shape, ours.dtype) != (eager.shape, eager.dtype):
        raise WrongResultError(
            f"{name} is {ours.dtype} {tuple(ours.shape)}, eager's {eager.dtype} {tuple(eager.shape)}"
        )
    error, eager_error = oracle.error(ours, exact), oracle.error(eager, exact)
    allowed = max(_AGAINST_EAGER * eager_error, chained * _DUE[ours.dtype] * oracle.rounding(ours.dtype))
    if not error <= allowed:
        raise WrongResultError(f"{name}: error {error:.3g} against float64, allowed is {allowed:.3g}")
    return error / allowed, error, eager_error
