"""The default dtype and the default device do not show: not in a result, a gradient, or a plan made under them.

The first call under an odd default makes the plan; a second one with the usual default takes it from the plan cache.
"""

from __future__ import annotations

import ast
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from operators import OPERATORS
from samples import Make, Operator, of_tensors, tensors_of
from targets import INTERPRETED, Target, clear_plans
from torch import Tensor
from twins import CHANNELS, WIDTH
from twins import maps as pyramid_maps

import fpn_kernels
from fpn_kernels import diagnostics, native, resampling
from fpn_kernels.gpu import geometry

Tensors = tuple[Tensor, ...]

DEFAULTS = [torch.float16, torch.bfloat16, torch.float64, "meta"]


@contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    """Within it, PyTorch's default dtype or device."""
    before = torch.get_default_dtype()
    try:
        if isinstance(value, str):
            torch.set_default_device(value)
        else:
            torch.set_default_dtype(value)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of calls of microseconds each: two threads on busy cores took 20 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _clear() -> None:
    """Clears the plan cache, and the tables that are made of small tensors."""
    clear_plans()
    for cached in (resampling.indices_agree, geometry.longest_window, native.multiplies_by_tiles):
        cached.cache_clear()


def _results(function: Callable[..., Any], tensors: Sequence[Tensor], recorded: bool) -> Tensors:
    """Of fresh tensors: the results, and the gradients of all tensors where autograd records the call."""
    fresh = [tensor.detach().requires_grad_(recorded) for tensor in tensors]
    results = function(*fresh)
    upstream = [result.detach() for result in results]
    return (*results, *(torch.autograd.grad(results, fresh, upstream) if recorded else ()))


def _assert_equal(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, usual in zip(results, expected, strict=True):
        assert (ours.dtype, ours.device, ours.stride()) == (usual.dtype, usual.device, usual.stride())
        assert torch.equal(ours, usual)


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_a_default_does_not_show(op: Operator, value: torch.dtype | str, target: Target) -> None:
    if INTERPRETED and (not target.implements(op.name) or value != DEFAULTS[0]):
        pytest.skip("seconds each: one default of the operators that Triton has")
    if not target.has(op.name):
        pytest.skip(f"{target} has only {', '.join(target.operators)}")
    dtypes = target.dtypes()[: 1 if INTERPRETED else None]
    for sample, layout, dtype in zip(
        itertools.cycle(op.samples), itertools.cycle(("nhwc", "nchw")), dtypes, strict=False
    ):
        arguments = sample.arguments(Make(dtype, target.device, layout))
        function, tensors = of_tensors(op.call, arguments, sample.options), tensors_of(arguments)
        for recorded in (False, True):
            with fpn_kernels.use_backend(target.backend):
                expected = _results(function, tensors, recorded)
                _clear()
                with default(value):
                    odd = _results(function, tensors, recorded)
                afterwards = _results(function, tensors, recorded)
            _assert_equal(odd, expected)
            _assert_equal(afterwards, expected)


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_levels_of_boxes(value: torch.dtype | str) -> None:
    boxes = torch.rand(50, 4) * 300
    expected = fpn_kernels.assign_levels(boxes)
    with default(value):
        assert torch.equal(fpn_kernels.assign_levels(boxes), expected)


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
@pytest.mark.parametrize(
    "make", [fpn_kernels.LastLevelMaxPool, lambda: fpn_kernels.LastLevelP6P7(CHANNELS[-1], WIDTH)], ids=["P6", "P6, P7"]
)
def test_a_network_of_float32(make: Callable[[], Any], value: torch.dtype | str, target: Target) -> None:
    if INTERPRETED:
        pytest.skip("its operators are tested above")
    network = fpn_kernels.FeaturePyramidNetwork(CHANNELS, WIDTH, extra_blocks=make()).to(target.device)
    features = {name: x.detach().to(target.device) for name, x in pyramid_maps().items()}

    def results() -> Tensors:
        inputs = {name: x.clone().requires_grad_() for name, x in features.items()}
        outputs = tuple(network(inputs).values())
        leaves = [*inputs.values(), *network.parameters()]
        return (*outputs, *torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs]))

    with fpn_kernels.use_backend(target.backend):
        expected = results()
        _clear()
        with default(value):
            odd = results()
        afterwards = results()
    _assert_equal(odd, expected)
    _assert_equal(afterwards, expected)


@pytest.mark.parametrize("value", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_new_module_has_the_default_dtype(value: torch.dtype) -> None:
    with default(value):
        modules = [fpn_kernels.FeaturePyramidNetwork((4, 8), 8), fpn_kernels.WeightedMerge(2)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {value}


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_the_report_on_this_machine(value: torch.dtype | str) -> None:
    expected = diagnostics.report()
    _clear()
    with default(value):
        assert diagnostics.report() == expected


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_tables_are_on_the_host(value: torch.dtype | str) -> None:
    def tables() -> list[Any]:
        _clear()
        agree = [resampling.indices_agree(5, 8, mode, torch.float64) for mode in resampling.NEAREST_MODES]
        windows = [geometry.longest_window(5, 8, mode) for mode in resampling.MODES]
        return [*agree, *windows, resampling.scale(5, 8), resampling.source_index(5, 8).tolist()]

    expected = tables()
    with default(value):
        assert tables() == expected


CONSTRUCTORS = {
    *("empty", "empty_strided", "zeros", "ones", "full", "tensor", "as_tensor", "scalar_tensor", "arange", "linspace"),
    *("eye", "rand", "randn", "randint", "randperm"),
}


def test_each_tensor_is_made_with_a_dtype_and_a_device() -> None:
    """But the parameters and buffers of a new module, which have the defaults as PyTorch's own do."""
    package = pathlib.Path(fpn_kernels.__file__).parent
    found = 0
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "modules":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in CONSTRUCTORS or ast.unparse(node.func.value) != "torch":
                continue
            found += 1
            needed = {"dtype", "device"}
            if (path.name, node.func.attr) == ("decompositions.py", "arange"):
                needed = {"device"}  # of a whole number, maybe a symbolic one: int64
            missing = needed - {keyword.arg for keyword in node.keywords}
            assert not missing, f"{path.name}:{node.lineno}: {ast.unparse(node)} has no {', '.join(sorted(missing))}"
    assert found > 20
