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
from samples import LAYOUTS, random_map
from targets import INTERPRETED, Target
from torch import Tensor
from twins import CHANNELS, WIDTH
from twins import maps as pyramid_maps

import fpn_kernels
from fpn_kernels import diagnostics, functional, resampling
from fpn_kernels.backends import native, serving
from fpn_kernels.backends.triton import geometry

Tensors = tuple[Tensor, ...]

DEFAULTS = [torch.float16, torch.bfloat16, torch.float64, "meta"]

# The convolutions are large enough for the compiled library's own products.
BATCH, CIN, COUT, TOP, FINE = (1, 4, 8, (2, 3), (4, 6)) if INTERPRETED else (1, 16, 20, (8, 9), (16, 18))
CHECKED_LAYOUTS = ("nhwc",) if INTERPRETED else LAYOUTS


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


def _forget() -> None:
    """Clears the plan cache, and the tables that are made of small tensors."""
    serving.forget()
    for cached in (resampling.indices_agree, geometry.longest_window, native.multiplies_by_tiles):
        cached.cache_clear()


def _operators(dtype: torch.dtype, device: str, layout: str) -> dict[str, tuple[Callable[..., Any], Tensors]]:
    """Each public function, as one of tensors alone, with such tensors."""
    torch.manual_seed(0)
    feature, second = (random_map((BATCH, CIN, *size), dtype, device, layout) for size in (FINE, TOP))
    lateral, top = (random_map((BATCH, COUT, *size), dtype, device, layout) for size in (FINE, TOP))
    weight, bias = random_map((COUT, CIN, 1, 1), dtype, device), random_map((1, 1, 1, COUT), dtype, device).flatten()
    taps = random_map((COUT, CIN, 3, 3), dtype, device)
    factors = random_map((1, 1, 1, 3), torch.promote_types(dtype, torch.float32), device).flatten().abs()
    operators: dict[str, tuple[Callable[..., Any], Tensors]] = {
        "upsample_add": (fpn_kernels.upsample_add, (top, lateral)),
        "lateral_connection": (fpn_kernels.lateral_connection, (feature, weight)),
        "lateral_connection, bias": (fpn_kernels.lateral_connection, (feature, weight, bias)),
        "lateral_connection, top": (
            lambda feature, weight, top: fpn_kernels.lateral_connection(feature, weight, None, top, gain=0.5),
            (feature, weight, top),
        ),
        "lateral_connection, all": (fpn_kernels.lateral_connection, (feature, weight, bias, top)),
        "output_conv": (fpn_kernels.output_conv, (feature, taps)),
        "output_conv, bias": (fpn_kernels.output_conv, (feature, taps, bias)),
        "output_conv_levels": (
            lambda fine, coarse, taps, bias: functional.output_conv_levels([fine, coarse], [taps] * 2, [bias, None]),
            (feature, second, taps, bias),
        ),
        "top_down_pathway": (
            lambda fine, coarse, weight, bias: fpn_kernels.top_down_pathway([fine, coarse], [weight] * 2, [bias, None]),
            (feature, second, weight, bias),
        ),
        "channel_sums": (torch.ops.fpn_kernels.channel_sums, (feature,)),
        "reorder": (lambda x: torch.ops.fpn_kernels.reorder(x, memory_format=torch.channels_last), (feature,)),
    }
    for mode in ("nearest-exact", "bilinear"):
        operators[f"upsample_add, {mode}"] = (
            lambda top, lateral, mode=mode: fpn_kernels.upsample_add(top, lateral, mode=mode, gain=0.5),
            (top, lateral),
        )
    for normalization in ("relu", "softmax"):
        operators[f"weighted_merge by {normalization}"] = (
            lambda *tensors, by=normalization: fpn_kernels.weighted_merge(tensors[:3], tensors[3], normalization=by),
            (lateral, top, lateral.clone(), factors),
        )
    return operators


def _results(function: Callable[..., Any], tensors: Tensors, wanted: Sequence[bool], like: Tensors) -> Tensors:
    """Of fresh tensors: what the function computes, and the gradients that are wanted."""
    fresh = [tensor.detach().requires_grad_(grad) for tensor, grad in zip(tensors, wanted, strict=True)]
    results = function(*fresh)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    inputs = [tensor for tensor in fresh if tensor.requires_grad]
    if not inputs:
        return results
    recorded = [place for place, result in enumerate(results) if result.requires_grad]
    upstream = [(like or results)[place].detach() for place in recorded]
    gradients = torch.autograd.grad([results[place] for place in recorded], inputs, upstream, allow_unused=True)
    return (*results, *gradients)


def _assert_equal(results: Tensors, expected: Tensors) -> None:
    for ours, usual in zip(results, expected, strict=True):
        if usual is None:
            assert ours is None
            continue
        assert (ours.dtype, ours.device, ours.stride()) == (usual.dtype, usual.device, usual.stride())
        assert torch.equal(ours, usual)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", CHECKED_LAYOUTS)
@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_a_default_does_not_show(value: torch.dtype | str, layout: str, target: Target) -> None:
    for dtype in target.dtypes() if layout in ("nchw", "nhwc") and not INTERPRETED else [torch.float32]:
        for name, (function, tensors) in _operators(dtype, target.device, layout).items():
            if INTERPRETED and "," in name:
                continue  # seconds each
            combinations = list(itertools.product((False, True), repeat=len(tensors)))
            for wanted in combinations[-1:] if INTERPRETED else combinations:
                with fpn_kernels.use_backend(target.backend):
                    expected = _results(function, tensors, wanted, ())
                    _forget()
                    with default(value):
                        odd = _results(function, tensors, wanted, expected)
                    afterwards = _results(function, tensors, wanted, expected)
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
        _forget()
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
    _forget()
    with default(value):
        assert diagnostics.report() == expected


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_tables_are_on_the_host(value: torch.dtype | str) -> None:
    def tables() -> list[Any]:
        _forget()
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
