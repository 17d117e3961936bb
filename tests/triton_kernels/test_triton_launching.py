"""The second launch, by `launch.Launch`, equals the first, by Triton's own launcher.

With a driver that compiles for sm_90 and records its launches (`benchmarks.no_launch`): no GPU is needed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_calls import plan_of
from samples import random_map
from targets import INTERPRETED
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import no_launch  # noqa: E402
from fpn_kernels.gpu import launch  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture
def driver() -> Iterator[no_launch.Driver]:
    with no_launch.driver() as stand_in:
        yield stand_in


def _map(channels: int, height: int, width: int, layout: str = "nhwc") -> Tensor:
    return random_map((2, channels, height, width), torch.bfloat16, layout=layout)


def _weight(kernel_size: int, layout: str = "nhwc") -> Tensor:
    return random_map((16, 16, kernel_size, kernel_size), torch.bfloat16, layout=layout)


def _vector() -> Tensor:
    return torch.randn(16).bfloat16()


def _factors() -> Tensor:
    return torch.rand(3)


# Name -> operator, and what makes the arguments of a call: alike each time, in tensors of their own.
CALLS: dict[str, tuple[str, Callable[[float], tuple[Any, ...]]]] = {
    "upsample_add": ("upsample_add", lambda gain: (_map(16, 4, 8), _map(16, 8, 16), "nearest", gain)),
    "upsample_add-nchw": (
        "upsample_add",
        lambda gain: (_map(16, 3, 5, "nchw"), _map(16, 7, 11, "nchw"), "bilinear", gain),
    ),
    "upsample_add_backward": (
        "upsample_add_backward",
        lambda gain: (_map(16, 8, 16), (4, 8), "nearest", gain),
    ),
    "upsample_add_backward-area": (
        "upsample_add_backward",
        lambda gain: (_map(16, 8, 16), (1, 1), "nearest", gain),
    ),
    "merge_backward": (
        "merge_backward",
        lambda gain: (_map(16, 8, 16), (4, 8), _map(16, 4, 8), "nearest", gain),
    ),
    "lateral_connection": (
        "lateral_connection",
        lambda gain: (_map(16, 8, 16), _weight(1).flatten(1), _vector(), _map(16, 4, 8), "nearest", gain, None),
    ),
    "lateral_connection-alone": (
        "lateral_connection",
        lambda gain: (_map(16, 8, 16), _weight(1).flatten(1), None, None, "nearest", gain, None),
    ),
    "lateral_connection-bilinear": (
        "lateral_connection",
        lambda gain: (_map(16, 8, 16), _weight(1).flatten(1), _vector(), _map(16, 3, 5), "bilinear", gain, None),
    ),
    "weighted_merge": (
        "weighted_merge",
        lambda gain: (_map(16, 8, 16), _map(16, 4, 8), _map(16, 8, 16), _factors(), "nearest"),
    ),
    "weighted_merge-two": (
        "weighted_merge",
        lambda gain: (_map(16, 8, 16), _map(16, 8, 16), None, _factors(), "nearest"),
    ),
    "weighted_merge_backward": (
        "weighted_merge_backward",
        lambda gain: (_map(16, 8, 16), _map(16, 8, 16), torch.rand(())),
    ),
    "output_conv": ("output_conv", lambda gain: (_map(16, 8, 16), _weight(3), _vector(), None)),
    "output_conv-packed": (
        "output_conv",
        lambda gain: (_map(16, 8, 16), _weight(3, "nchw"), None, torch.contiguous_format),
    ),
    "output_conv_levels": (
        "output_conv_levels",
        lambda gain: ([_map(16, 8, 16), _map(16, 4, 8)], [_weight(3)] * 2, [_vector(), _vector()], [0, 1]),
    ),
}


def _described(value: Any, names: dict[int, str]) -> Any:
    """Tensors by the argument that they are, or by shape and strides where the operator made them."""
    if isinstance(value, tuple):
        return tuple(_described(each, names) for each in value)
    if isinstance(value, Tensor):
        return names.get(value.data_ptr(), ("made", value.shape, value.stride(), value.dtype))
    return value


def _names(arguments: tuple[Any, ...]) -> dict[int, str]:
    flat = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
    return {each.data_ptr(): f"tensor {place}" for place, each in enumerate(flat) if isinstance(each, Tensor)}


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_launch_is_the_first_one(name: str, driver: no_launch.Driver) -> None:
    operator, make = CALLS[name]
    first, second = make(0.7), make(0.3)  # no ratio of sizes is one of these
    run = plan_of("triton", operator, *first)
    assert not driver.launched, "preparing launches nothing"
    run(*first)
    by_triton = [(kernel, grid, _described(arguments, _names(first))) for kernel, grid, arguments in driver.launched]
    assert by_triton
    driver.launched.clear()
    run(*second)
    repeated = [(kernel, grid, _described(arguments, _names(second))) for kernel, grid, arguments in driver.launched]
    # All but the gain, which is each call's own.
    with_gain = [
        (kernel, grid, tuple(0.3 if type(value) is float and value == 0.7 else value for value in arguments))
        for kernel, grid, arguments in by_triton
    ]
    assert repeated == with_gain
    if 0.7 in [each for each in first if isinstance(each, float)]:
        assert any(0.3 in [x for x in arguments if isinstance(x, float)] for _, _, arguments in repeated)


def test_arguments_are_bound_once(driver: no_launch.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, make = CALLS["upsample_add"]
    run = plan_of("triton", operator, *make(1.0))
    run(*make(1.0))

    def again(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("Triton bound the arguments a second time")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", again)
    run(*make(1.0))
    assert len(driver.launched) == 2


def test_a_launch_holds_on_to_no_tensor(driver: no_launch.Driver) -> None:
    alive = {}
    for name, (operator, make) in CALLS.items():
        call = make(0.5)
        flat = [each for argument in call for each in (argument if isinstance(argument, list) else [argument])]
        run = plan_of("triton", operator, *call)
        run(*call)
        # The prepared call is kept, as the library keeps it.
        alive[name] = run, [weakref.ref(each) for each in flat if isinstance(each, Tensor)]
    driver.launched.clear()
    del call, flat
    gc.collect()
    held = [name for name, (_, tensors) in alive.items() if any(tensor() is not None for tensor in tensors)]
    assert alive and not held


def test_a_stand_in_has_the_strides_of_the_result() -> None:
    like = _map(16, 4, 8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        stand_in = launch.stand_in((2, 16, 4, 8), like, memory_format)
        assert stand_in.is_meta and stand_in.dtype == like.dtype
        assert stand_in.stride() == torch.empty((2, 16, 4, 8), memory_format=memory_format).stride()
