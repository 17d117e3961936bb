"""Streams, graphs, devices and very large maps, on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from samples import MERGES, Sizes, random_map
from targets import INTERPRETED, Target, parameters

import fpn_kernels
from fpn_kernels import reference, resampling

if INTERPRETED:
    pytest.skip("the interpreter is on: nothing is launched", allow_module_level=True)

pytestmark = pytest.mark.gpu

MODES = list(resampling.MODES)


@pytest.fixture(params=parameters("upsample_add", device="cuda"), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend that has this operator and its backward, on a GPU."""
    chosen: Target = request.param
    return chosen


def _pair(sizes: Sizes, dtype: torch.dtype, layout: str, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    top = random_map((sizes.batch, sizes.channels, *sizes.top), dtype, device, layout)
    return top, random_map((sizes.batch, sizes.channels, *sizes.fine), dtype, device, layout)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_current_stream(layout: str, target: Target) -> None:
    """A side stream waits before it writes the inputs, so a launch on another stream would read old values."""
    expected_top, expected_lateral = _pair(MERGES[1], torch.float32, layout)
    top, lateral = (torch.full_like(tensor, float("nan")) for tensor in (expected_top, expected_lateral))
    expected = reference.upsample_add(expected_top, expected_lateral)
    with target.serves("upsample_add", "upsample_add_backward"):
        expected_grad = torch.ops.fpn_kernels.upsample_add_backward(expected_lateral, MERGES[1].top)
        fpn_kernels.upsample_add(top, lateral)  # compiles before the wait
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            top.copy_(expected_top)
            lateral.copy_(expected_lateral)
            result = fpn_kernels.upsample_add(top, lateral)
            grad_top = torch.ops.fpn_kernels.upsample_add_backward(lateral, MERGES[1].top)
        stream.synchronize()
    assert torch.equal(result, expected)
    assert torch.equal(grad_top, expected_grad)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", MODES)
def test_graph_capture(mode: str, layout: str, target: Target) -> None:
    top, lateral = _pair(MERGES[6], torch.bfloat16, layout)
    with target.serves("upsample_add"):
        fpn_kernels.upsample_add(top, lateral, mode=mode)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = fpn_kernels.upsample_add(top, lateral, mode=mode)
        for tensor in (top, lateral):
            tensor.copy_(torch.randn(tensor.shape))
        graph.replay()
        assert torch.equal(result, fpn_kernels.upsample_add(top, lateral, mode=mode))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_captured_training_step(layout: str) -> None:
    """make_graphed_callables, replayed on other maps, gives the gradients of a step without capture."""
    channels, sizes = (64, 128, 256), ((50, 84), (25, 42), (13, 21))
    network = fpn_kernels.FeaturePyramidNetwork(channels, 256).to("cuda", torch.bfloat16)
    twin = copy.deepcopy(network)

    def maps() -> list[torch.Tensor]:
        made = [
            random_map((1, c, *size), torch.bfloat16, "cuda", layout) for c, size in zip(channels, sizes, strict=True)
        ]
        return [each.requires_grad_() for each in made]

    captured = torch.cuda.make_graphed_callables(network, (maps(),))
    features = maps()
    ours, theirs = (list(module(features)) for module in (captured, twin))
    grads = [torch.randn_like(level) for level in ours]
    for result, expected in zip(
        (*ours, *torch.autograd.grad(ours, [*features, *network.parameters()], grads)),
        (*theirs, *torch.autograd.grad(theirs, [*features, *twin.parameters()], grads)),
        strict=True,
    ):
        # cuDNN may sum its gradients of a weight in another order.
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", MODES)
def test_more_than_2_to_the_31_elements(mode: str, layout: str, target: Target) -> None:
    """The last image of a batch is at offsets beyond 32 bits."""
    batch, channels, size = 9, 256, 1024  # 2.4e9 elements, 4.8 GB in bfloat16
    needed = 3 * 2 * batch * channels * size * size
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    top = torch.empty(batch, channels, 512, 512, device=target.device, dtype=torch.bfloat16)
    lateral = torch.empty(batch, channels, size, size, device=target.device, dtype=torch.bfloat16)
    top, lateral = (tensor.to(memory_format=memory_format).normal_() for tensor in (top, lateral))
    with target.serves("upsample_add", "upsample_add_backward"):
        result = fpn_kernels.upsample_add(top, lateral, mode=mode)
        alone = fpn_kernels.upsample_add(top[-1:], lateral[-1:], mode=mode)
        assert torch.equal(result[-1:], alone)
        del result, alone
        grad_top = torch.ops.fpn_kernels.upsample_add_backward(lateral, (512, 512), mode=mode)
        assert torch.equal(
            grad_top[-1:], torch.ops.fpn_kernels.upsample_add_backward(lateral[-1:], (512, 512), mode=mode)
        )


def test_a_device_that_is_not_the_current_one(target: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    top, lateral = _pair(MERGES[1], torch.float32, "nchw", "cuda:1")
    with torch.cuda.device(0), target.serves("upsample_add"):
        result = fpn_kernels.upsample_add(top, lateral)
    assert result.device == lateral.device and torch.equal(result, reference.upsample_add(top, lateral))
