"""`FeaturePyramidNetwork` and its twin in plain PyTorch, their maps, and the operators that a call uses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from foreign.torchvision_twin import FeaturePyramidNetwork as Twin
from torch import Tensor, nn

from fpn_kernels.modules import FeaturePyramidNetwork
from fpn_kernels.operators.dispatch import record_calls

CHANNELS = [8, 12, 16, 20]
WIDTH = 12
SIZES = [(38, 57), (19, 29), (10, 15), (5, 8)]  # a 152 x 228 image at strides 4 to 32: odd sizes at each merge
NAMES = ["0", "1", "2", "3"]


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def scramble(module: nn.Module) -> None:
    """Set values that show a wrong fold: no zero bias, no unit scale, no negative variance."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var") or ".1.weight" in name:
                value.uniform_(0.5, 2.0)
            elif name.endswith(("bias", "running_mean")):
                value.normal_()


def pair(
    norm_layer: Callable[[int], nn.Module] | None = None, *, device: str = "cpu", **options: Any
) -> tuple[FeaturePyramidNetwork, Twin]:
    """The network and its twin with the same scrambled weights, in eval mode."""
    network = FeaturePyramidNetwork(CHANNELS, WIDTH, None, norm_layer, **options)
    scramble(network)
    twin = Twin(CHANNELS, WIDTH, None, norm_layer, **options)
    twin.load_state_dict(network.state_dict(), strict=True)
    return network.to(device).eval(), twin.to(device).eval()


def maps(
    batch: int = 2,
    *,
    channels: list[int] = CHANNELS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> OrderedDict[str, Tensor]:
    return OrderedDict(
        (name, torch.randn(batch, c, *size, device=device, dtype=dtype, requires_grad=grad))
        for name, c, size in zip(NAMES, channels, SIZES, strict=True)
    )


def assert_same(actual: OrderedDict[str, Tensor], expected: OrderedDict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=2e-5 * float(value.detach().abs().max()))


def served(call: Callable[[], Any]) -> list[str]:
    """The operators of the pathway that a call uses; `convolved` counts those of the outputs."""
    with record_calls() as calls:
        call()
    return [operator for operator, _ in calls if operator not in ("output_conv", "reorder")]


def convolved(call: Callable[[], Any]) -> int:
    """The number of output convolutions that a call computes by the library."""
    with record_calls() as calls:
        call()
    return [operator for operator, _ in calls].count("output_conv")
