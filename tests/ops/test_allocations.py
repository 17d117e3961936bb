"""The memory that a call allocates and that training keeps: results and inputs, never a resized copy.

PyTorch's profiler records the allocations of ATen and of the compiled library; autograd's hooks record the tensors that
are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nodes import NODES, fusion_weights, maps
from samples import DTYPES, Sizes, random_map
from targets import needs_library
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from twins import CHANNELS, WIDTH
from twins import maps as pyramid_maps

import fpn_kernels

# The resized copy (64 KB in 16 bits) is far above the few bytes that a call may allocate besides its results.
SIZES = Sizes(1, 16, (19, 29), (38, 57), "C5 to C4 of a 600 x 900 image")
MARGIN = 8192


def allocated(call: Callable[[], Any]) -> int:
    """The bytes that a call allocates, whether it frees them again or not."""
    call()  # makes everything that is made once
    # torch 2.11 warns of events that it drops between cycles, except with this option.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    events = profiler.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _merge(dtype: torch.dtype, layout: str = "nchw") -> tuple[Tensor, Tensor]:
    shape = (SIZES.batch, SIZES.channels)
    return random_map((*shape, *SIZES.top), dtype, layout=layout), random_map(
        (*shape, *SIZES.fine), dtype, layout=layout
    )


def test_the_profiler_sees_a_resized_copy() -> None:
    """The measure itself: eager's chain allocates its result and the copy."""
    top, lateral = _merge(torch.float32)
    assert allocated(lambda: fpn_kernels.reference.upsample_add(top, lateral)) >= 2 * size_of(lateral)
    assert size_of(lateral) <= allocated(lambda: lateral + 1) <= size_of(lateral) + MARGIN


@needs_library
@pytest.mark.parametrize(
    ("dtype", "mode", "layout"),
    [
        (torch.float32, "nearest", "nchw"),
        (torch.bfloat16, "bilinear", "nhwc"),
        (torch.float16, "nearest", "sliced"),
        (torch.float64, "bilinear", "sliced-nhwc"),
    ],
    ids=str,
)
def test_merges_allocate_their_results_alone(dtype: torch.dtype, mode: str, layout: str) -> None:
    top, lateral = _merge(dtype, layout)
    inputs, weights = [lateral, top, lateral], fusion_weights(3, dtype=torch.promote_types(dtype, torch.float32))
    operators = torch.ops.fpn_kernels
    for result, call in (
        (lateral, lambda: fpn_kernels.upsample_add(top, lateral, mode=mode)),
        (lateral, lambda: fpn_kernels.weighted_merge(inputs, weights, mode=mode)),
        (top, lambda: operators.upsample_add_backward(lateral, top.shape[2:], mode=mode)),
        (top, lambda: operators.merge_backward(lateral, top.shape[2:], None, mode=mode)),
        (lateral, lambda: operators.weighted_merge_backward(lateral, lateral, weights[0])),
    ):
        with fpn_kernels.use_backend("native"):
            assert size_of(result) <= allocated(call) <= size_of(result) + MARGIN


@needs_library
@pytest.mark.parametrize(("mode", "layout"), [("nearest", "nhwc"), ("bilinear", "nchw")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lateral_connection_never_holds_a_resized_copy(dtype: torch.dtype, mode: str, layout: str) -> None:
    """PyTorch's convolution needs one more map than the result: the lateral one, into which the top is merged."""
    top, lateral = _merge(dtype, layout)
    feature, weight = random_map((1, 8, *SIZES.fine), dtype, layout=layout), random_map((16, 8, 1, 1), dtype)
    with fpn_kernels.use_backend("native"):
        without = allocated(lambda: fpn_kernels.lateral_connection(feature, weight))
        merged = allocated(lambda: fpn_kernels.lateral_connection(feature, weight, None, top, mode=mode))
    assert size_of(lateral) <= merged <= max(size_of(lateral), without) + size_of(lateral) + MARGIN
    eager = allocated(lambda: fpn_kernels.reference.lateral_connection(feature, weight, None, top, mode=mode))
    assert merged <= eager - size_of(lateral) + MARGIN


# ------------------------------------------------------------------------------------- what training keeps


def kept(call: Callable[[], Any]) -> list[Tensor]:
    """The tensors that autograd saves for the backward, one per storage."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return list(saved.values())


def _are(tensors: list[Tensor], expected: list[Tensor]) -> bool:
    """The very same memory."""
    return {x.untyped_storage().data_ptr() for x in tensors} == {x.untyped_storage().data_ptr() for x in expected}


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_merge_keeps_nothing(mode: str) -> None:
    top, lateral = (x.requires_grad_() for x in _merge(torch.float32))
    assert kept(lambda: fpn_kernels.upsample_add(top, lateral, mode=mode, gain=0.5)) == []
    chain = kept(lambda: fpn_kernels.reference.upsample_add(top, lateral * 1.0, mode=mode) * lateral)
    assert chain, "the hook sees what a chain in eager keeps"


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_convolutions_keep_their_inputs(mode: str) -> None:
    top, _ = _merge(torch.float32)
    feature, weight, bias = random_map((1, 8, *SIZES.fine), torch.float32), torch.randn(16, 8, 1, 1), torch.randn(16)
    top, feature, weight, bias = (x.requires_grad_() for x in (top, feature, weight, bias))
    assert _are(kept(lambda: fpn_kernels.lateral_connection(feature, weight, bias, top, mode=mode)), [feature, weight])
    taps = torch.randn(16, 8, 3, 3, requires_grad=True)
    assert _are(kept(lambda: fpn_kernels.output_conv(feature, taps, bias)), [feature, taps])


@pytest.mark.parametrize("node", NODES)
def test_a_weighted_merge_keeps_its_inputs(node: str) -> None:
    inputs = maps(node, SIZES, torch.float32, grad=True)
    factors = torch.rand(len(inputs), requires_grad=True)
    third = inputs[2] if len(inputs) == 3 else None
    call = torch.ops.fpn_kernels.weighted_merge
    assert _are(kept(lambda: call(inputs[0], inputs[1], third, factors)), [*inputs, factors])


def test_a_pathway_keeps_its_features_and_weights() -> None:
    features = list(pyramid_maps(grad=True).values())
    weights = [torch.randn(WIDTH, cin, 1, 1, requires_grad=True) for cin in CHANNELS]
    biases = [torch.randn(WIDTH, requires_grad=True) for _ in CHANNELS]
    assert _are(kept(lambda: fpn_kernels.top_down_pathway(features, weights, biases)), [*features, *weights])


def test_a_network_keeps_one_map_per_convolution() -> None:
    """Each convolution's input and weight: the features, and the merged maps that the output convolutions read."""
    network = fpn_kernels.FeaturePyramidNetwork(CHANNELS, WIDTH)
    features = pyramid_maps(1, grad=True)
    saved = kept(lambda: network(features))
    merged = sum(WIDTH * x.shape[2] * x.shape[3] * 4 for x in features.values())
    weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
    assert size_of(*saved) == size_of(*features.values(), *weights) + merged
