"""The compiled library's operators with wrong arguments: each raises RuntimeError and writes nothing.

The public functions have checks of their own.  These protect direct calls of `torch.ops.fpn_kernels_native`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_kernels import native

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = {"N": 2, "C": 20, "I": 18, "H": 16, "W": 18, "h": 8, "w": 9, "x": 16, "y": 18, "k": 3, "n": 3}

# Arguments in the schema's order.  For a tensor: its axes, and its dtypes unless they are the maps'.  Equal letters are
# equal sizes; a letter in one tensor only (e.g. the top's h and w) may be any size.
MAPS: tuple[torch.dtype, ...] = ()
SUMS = (torch.float32, torch.float64)
OPERATORS: dict[str, dict[str, Any]] = {
    "upsample_add": {
        "top": ("NChw", MAPS),
        "lateral": ("NCHW", MAPS),
        "mode": 0,
        "gain": 0.5,
        "out": ("NCHW", MAPS),
    },
    "upsample_add_backward": {"grad": ("NCHW", MAPS), "mode": 0, "gain": 0.5, "grad_top": ("NChw", MAPS)},
    "merge_backward": {
        "grad": ("NCHW", MAPS),
        "upstream": ("NChw", MAPS),
        "mode": 2,
        "gain": 0.5,
        "grad_top": ("NChw", MAPS),
        "grad_bias": ("C", (torch.float64,)),
    },
    "weighted_merge": {
        "first": ("NCHW", MAPS),
        "second": ("NChw", MAPS),
        "third": ("NCxy", MAPS),
        "weights": ("n", SUMS),
        "relu": True,
        "eps": 1e-4,
        "mode": 2,
        "out": ("NCHW", MAPS),
    },
    "weighted_merge_backward": {
        "grad": ("NCHW", MAPS),
        "input": ("NCHW", MAPS),
        "factor": ("", SUMS),
        "grad_input": ("NCHW", MAPS),
        "grad_factor": ("", (torch.float64,)),
    },
    "lateral_connection": {
        "feature": ("NIHW", MAPS),
        "weight": ("CI", MAPS),
        "bias": ("C", (torch.float32,)),
        "top": ("NChw", MAPS),
        "mode": 2,
        "gain": 0.5,
        "out": ("NCHW", MAPS),
    },
    "lateral_connection_path": {
        "feature": ("NIHW", MAPS),
        "weight": ("CI", MAPS),
        "top": ("NChw", MAPS),
        "channels_last": True,
    },
    "output_conv": {
        "feature": ("NIHW", MAPS),
        "weight": ("CIkk", MAPS),
        "bias": ("C", MAPS),
        "out": ("NCHW", MAPS),
    },
    "output_conv_path": {"feature": ("NIHW", MAPS), "weight": ("CIkk", MAPS)},
    "output_conv_backward_weight_path": {"grad": ("NCHW", MAPS), "feature": ("NIHW", MAPS)},
    "output_conv_backward_weight": {
        "grad": ("NCHW", MAPS),
        "feature": ("NIHW", MAPS),
        "grad_weight": ("CIkk", MAPS),
        "grad_bias": ("C", (torch.float64,)),
    },
    "reorder": {"source": ("NCHW", MAPS), "out": ("NCHW", MAPS)},
}
# Operators without tensors.
NUMBERS = {"limit_level", "multiplies_by_tiles", "cuda_refusal"}


@functools.cache
def _schemas() -> dict[str, Any]:
    namespace = "fpn_kernels_native::"
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.removeprefix(namespace): s for s in schemas if s.name.startswith(namespace)}


def _tensors(operator: str) -> dict[str, tuple[str, tuple[torch.dtype, ...]]]:
    return {name: each for name, each in OPERATORS[operator].items() if isinstance(each, tuple)}


def _outputs(operator: str) -> list[str]:
    return [a.name for a in _schemas()[operator].arguments if a.alias_info is not None and a.alias_info.is_write]


def _shape(axes: str) -> list[int]:
    return [SIZES[axis] for axis in axes]


def _arguments(operator: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Correct arguments; every tensor is filled with 7."""
    arguments = dict(OPERATORS[operator])
    for name, (axes, dtypes) in _tensors(operator).items():
        arguments[name] = torch.full(_shape(axes), 7.0, dtype=dtypes[0] if dtypes else dtype, device=device)
    return arguments


def _call(operator: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.fpn_kernels_native, operator).default(*arguments.values())


def _can_be_read(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.is_sparse:
        return False
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    return tensor.untyped_storage().nbytes() >= end or not tensor.is_contiguous()


def _refused(operator: str, arguments: dict[str, Any], what: str, message: str = r"\w+: expected ") -> None:
    outputs = {name: arguments[name] for name in _outputs(operator) if _can_be_read(arguments[name])}
    before = {name: tensor.clone() for name, tensor in outputs.items()}
    try:
        _call(operator, arguments)
    except RuntimeError as error:
        assert re.search(message, str(error)), f"{what}: {error}"
    else:
        pytest.fail(f"{operator} accepted {what}")
    for name, values in before.items():
        assert torch.equal(outputs[name], values), f"{what}: {name} was written"


def _freed(tensor: Tensor, size: int) -> Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


def _wrong_tensors(operator: str, name: str, right: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Wrong versions of one argument."""
    axes, dtypes = _tensors(operator)[name]
    allowed = dtypes or (right.dtype,)
    for dtype in (*DTYPES, torch.float8_e5m2, torch.int16, torch.int64, torch.bool, torch.complex64):
        if dtype not in allowed:
            yield f"{name} of {dtype}", right.to(dtype)
    yield f"{name} with an axis more", right[None]
    shape, used = list(right.shape), "".join(each for each, _ in _tensors(operator).values())
    if axes:
        yield f"{name} with an axis less", right[0].clone()
        yield f"{name} of one number", right.flatten()[0].clone()
    for axis, letter in enumerate(axes):
        if used.count(letter) > 1 or letter == "n":
            for size in (0, 1, shape[axis] - 1, shape[axis] + 1):
                wrong = [*shape[:axis], size, *shape[axis + 1 :]]
                yield f"{name} of {wrong}", torch.full(wrong, 7.0, dtype=right.dtype, device=right.device)
        elif letter in "hwxy":
            wrong = [*shape[:axis], 0, *shape[axis + 1 :]]
            yield f"{name} of {wrong}", torch.full(wrong, 7.0, dtype=right.dtype, device=right.device)
    if right.numel() > 1:
        yield f"{name} in freed memory", _freed(right.clone(), 0)
        yield f"{name} in half of its memory", _freed(right.clone(), right.nbytes // 2)
        yield f"{name} beyond its memory", _freed(right.repeat(2, *[1] * (right.dim() - 1))[len(right) :], right.nbytes)


def _wrong_outputs(name: str, right: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Wrong versions of an output: strides of tensors that are not dense."""
    shape = list(right.shape)
    dense = [*right.stride()]
    for axis, size in enumerate(shape):
        if size > 1:
            yield f"{name} expanded along axis {axis}", right.select(axis, 0).unsqueeze(axis).expand(shape)
            twice = right.repeat_interleave(2, dim=axis)
            yield f"{name} with gaps along axis {axis}", twice[(slice(None),) * axis + (slice(None, None, 2),)]
            overlapping = [*dense[:axis], max(dense[axis] - 1, 0), *dense[axis + 1 :]]
            yield f"{name} overlapping along axis {axis}", right.as_strided(shape, overlapping)
    if right.dim() == 4:
        # Neither NCHW nor NHWC.
        for order in ((1, 0, 2, 3), (0, 1, 3, 2), (0, 3, 2, 1), (3, 2, 1, 0)):
            inverse = [order.index(axis) for axis in range(4)]
            yield f"{name} permuted by {order}", right.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_table_is_that_of_the_schemas(operator: str) -> None:
    schemas = _schemas()
    assert set(schemas) - NUMBERS == set(OPERATORS)
    assert [argument.name for argument in schemas[operator].arguments] == list(OPERATORS[operator])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_right_arguments_are_accepted(operator: str, dtype: torch.dtype) -> None:
    _call(operator, _arguments(operator, dtype))
    for name, argument in _arguments(operator, dtype).items():
        if isinstance(argument, Tensor) and argument.dim() == 4 and name != "upstream":
            arguments = _arguments(operator, dtype)
            arguments[name] = argument.contiguous(memory_format=torch.channels_last)
            if name == "grad_top" and "upstream" in arguments:
                arguments["upstream"] = arguments["upstream"].contiguous(memory_format=torch.channels_last)
            _call(operator, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_tensor_is_refused(operator: str, dtype: torch.dtype) -> None:
    for name in _tensors(operator):
        right = _arguments(operator, dtype)[name]
        for what, wrong in _wrong_tensors(operator, name, right):
            _refused(operator, {**_arguments(operator, dtype), name: wrong}, what)
        # The dispatcher finds no kernel for these.
        _refused(operator, {**_arguments(operator, dtype), name: right.to("meta")}, f"{name} on meta", "Meta")
        if right.dim() == 4:
            _refused(operator, {**_arguments(operator, dtype), name: right.to_sparse()}, f"{name}, sparse", "Sparse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_result_that_is_not_dense_is_refused(operator: str, dtype: torch.dtype) -> None:
    for name in _outputs(operator):
        for what, wrong in _wrong_outputs(name, _arguments(operator, dtype)[name]):
            _refused(operator, {**_arguments(operator, dtype), name: wrong}, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_result_in_the_memory_of_another_tensor_is_refused(operator: str, dtype: torch.dtype) -> None:
    for name in _outputs(operator):
        for other in _tensors(operator):
            if other == name:
                continue
            arguments = _arguments(operator, dtype)
            mine, its = arguments[name], arguments[other]
            size = max(mine.nbytes, its.nbytes)
            memory = torch.zeros(size + 8, dtype=torch.uint8)
            first = memory[: its.nbytes].view(its.dtype).view(its.shape)
            # At its first byte, and at its last 8 bytes, which are whole elements of each dtype.
            for at in {0, (its.nbytes - 1) // 8 * 8}:
                memory = torch.zeros(size + at + 8, dtype=torch.uint8)
                first = memory[: its.nbytes].view(its.dtype).view(its.shape)
                second = memory[at : at + mine.nbytes].view(mine.dtype).view(mine.shape)
                _refused(operator, {**arguments, name: second, other: first}, f"{name} in {other}", "memory of its own")


@pytest.mark.parametrize("number", [-1, 3, 2**32, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if "mode" in OPERATORS[operator]])
def test_an_unknown_mode_is_refused(operator: str, number: int) -> None:
    _refused(operator, {**_arguments(operator, torch.float32), "mode": number}, f"mode {number}", "mode: expected")


@pytest.mark.parametrize("eps", [-1e-9, math.inf, math.nan])
def test_an_impossible_eps_is_refused(eps: float) -> None:
    _refused("weighted_merge", {**_arguments("weighted_merge", torch.float32), "eps": eps}, "eps", "eps: expected")


@pytest.mark.parametrize("make", [lambda x: x[::2], lambda x: x[:1].expand(20)], ids=["strided", "expanded"])
def test_a_bias_whose_numbers_are_apart_is_refused(make: Callable[[Tensor], Tensor]) -> None:
    arguments = _arguments("lateral_connection", torch.float32)
    _refused("lateral_connection", {**arguments, "bias": make(torch.zeros(40))}, "bias", "bias: expected a stride of 1")


def test_an_upstream_gradient_with_other_strides_is_refused() -> None:
    arguments = _arguments("merge_backward", torch.float32)
    for wrong in (
        arguments["upstream"].contiguous(memory_format=torch.channels_last),
        arguments["upstream"].mT.contiguous().mT,
    ):
        _refused(
            "merge_backward", {**arguments, "upstream": wrong}, "upstream", "upstream: expected the strides of grad_top"
        )


@pytest.mark.parametrize("operator", ["upsample_add", "weighted_merge", "merge_backward", "upsample_add_backward"])
def test_more_pixels_along_an_axis_than_an_index_holds_are_refused(operator: str) -> None:
    """Expanded maps without memory; indices were truncated to 32 bits, and read before the map."""
    name = {"upsample_add": "top", "weighted_merge": "second"}.get(operator, "grad")
    arguments = _arguments(operator, torch.float32)
    wide = torch.full((2, 20, 16, 1), 7.0).expand(2, 20, 16, 2**31)
    message = "2.31 - 1 pixels"
    _refused(operator, {**arguments, name: wide}, "too many columns", message)
    too_many = torch.full((2, 20, 1, 1), 7.0).expand(2, 20, 2**30, 2**26)
    _refused(operator, {**arguments, name: too_many}, "too many elements", "at most 2.56 elements")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_maps_without_elements_are_harmless(operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of these calls divided by zero."""
    for axis in "NCI":
        with monkeypatch.context() as patch:
            patch.setitem(SIZES, axis, 0)
            arguments = _arguments(operator, dtype)
            _call(operator, arguments)
            for name in _outputs(operator):
                # An empty sum is zero; an operator that returns False writes nothing.
                assert not arguments[name].isnan().any()


@pytest.mark.parametrize("channels", [16, 20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_merge_over_its_lateral(memory_format: torch.memory_format, channels: int) -> None:
    """Allowed if lines are whole vectors; otherwise overlapping vectors would read results."""
    top = torch.randn(2, channels, 8, 8)
    lateral = torch.randn(2, channels, 16, channels).contiguous(memory_format=memory_format)
    merge = torch.ops.fpn_kernels_native.upsample_add.default
    expected = torch.empty_like(lateral)
    merge(top, lateral, 0, 0.5, expected)
    if channels % 16 == 0:
        merge(top, lateral, 0, 0.5, lateral)
        assert torch.equal(lateral, expected)
    else:
        with pytest.raises(RuntimeError, match="out: expected memory of its own"):
            merge(top, lateral, 0, 0.5, lateral)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 5), (5, 1), (1, 1)], ids=str)
def test_a_dense_result_may_have_any_stride_along_an_axis_of_one_pixel(
    size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    source = torch.randn(2, 3, *size)
    dense = torch.empty_like(source, memory_format=memory_format)
    strides = [777 if n == 1 else s for n, s in zip(dense.shape, dense.stride(), strict=True)]
    out = dense.as_strided(dense.shape, strides)
    torch.ops.fpn_kernels_native.reorder.default(source, out)
    assert torch.equal(out, source) and torch.equal(dense, source)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["upsample_add", "upsample_add_backward"])
def test_wrong_tensors_on_cuda_are_refused(operator: str, dtype: torch.dtype) -> None:
    if native.cuda_refusal(torch.cuda.current_device()) is not None:
        pytest.skip("no kernels for CUDA")
    for name in _tensors(operator):
        right = _arguments(operator, dtype, "cuda")[name]
        wrongs = [(f"{name} on the CPU", right.cpu()), *_wrong_tensors(operator, name, right)]
        if name in _outputs(operator):
            wrongs += _wrong_outputs(name, right)
        for what, wrong in wrongs:
            _refused(operator, {**_arguments(operator, dtype, "cuda"), name: wrong}, what)
