"""The levels above the pyramid: their values, their names, and other classes of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels.modules import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7


def maps(*sizes: tuple[int, int], channels: int = 6) -> list[Tensor]:
    return [torch.randn(2, channels, *size) for size in sizes]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 8), (19, 29)])
def test_pool_takes_every_second_pixel_of_the_coarsest_map(size: tuple[int, int]) -> None:
    p = maps((40, 60), size)
    results, names = LastLevelMaxPool()(list(p), [], ["a", "b"])
    assert names == ["a", "b", "pool"] and len(results) == 3
    assert results[0] is p[0] and results[1] is p[1]
    assert torch.equal(results[2], p[1][:, :, ::2, ::2])
    assert results[2].untyped_storage().data_ptr() != p[1].untyped_storage().data_ptr()


@pytest.mark.parametrize(("in_channels", "source"), [(6, "p5"), (10, "c5")])
def test_p6_and_p7(in_channels: int, source: str) -> None:
    block = LastLevelP6P7(in_channels, 6)
    assert [(name, tuple(p.shape)) for name, p in block.named_parameters()] == [
        ("p6.weight", (6, in_channels, 3, 3)),
        ("p6.bias", (6,)),
        ("p7.weight", (6, 6, 3, 3)),
        ("p7.bias", (6,)),
    ]
    nn.init.normal_(block.p6.bias), nn.init.normal_(block.p7.bias)
    p, c = maps((40, 60), (5, 8)), maps((40, 60), (5, 8), channels=10)
    results, names = block(list(p), list(c), ["2", "3"])
    p6 = F.conv2d({"p5": p, "c5": c}[source][-1], block.p6.weight, block.p6.bias, stride=2, padding=1)
    p7 = F.conv2d(p6.relu(), block.p7.weight, block.p7.bias, stride=2, padding=1)
    assert names == ["2", "3", "p6", "p7"] and results[:2] == p
    assert torch.equal(results[2], p6) and torch.equal(results[3], p7)
    assert (p6 < 0).any(), "else the ReLU between them is not tested"
    assert results[3].shape == (2, 6, 2, 2)


def test_p6p7_start_as_torchvisions_do() -> None:
    torch.manual_seed(3)
    block = LastLevelP6P7(10, 6)
    torch.manual_seed(3)
    p6, p7 = nn.Conv2d(10, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
    for mine, conv in ((block.p6, p6), (block.p7, p7)):
        nn.init.kaiming_uniform_(conv.weight, a=1)
        assert torch.equal(mine.weight, conv.weight) and not mine.bias.any()


@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        (LastLevelMaxPool(), {"c4": (10, 15), "c5": (5, 8), "pool": (3, 4)}),
        (LastLevelP6P7(6, 6), {"c4": (10, 15), "c5": (5, 8), "p6": (3, 4), "p7": (2, 2)}),
        (LastLevelP6P7(9, 6), {"c4": (10, 15), "c5": (5, 8), "p6": (3, 4), "p7": (2, 2)}),
    ],
    ids=["pool", "p5", "c5"],
)
def test_in_the_network(block: ExtraFPNBlock, sizes: dict[str, tuple[int, int]]) -> None:
    network = FeaturePyramidNetwork([7, 9], 6, block)
    x = {"c4": torch.randn(1, 7, 10, 15), "c5": torch.randn(1, 9, 5, 8, requires_grad=True)}
    results = network(x)
    assert {name: tuple(p.shape[2:]) for name, p in results.items()} == sizes
    assert list(results) == list(sizes) and list(x) == ["c4", "c5"]
    list(results.values())[-1].sum().backward()
    assert x["c5"].grad is not None and x["c5"].grad.abs().sum() > 0


class Doubled(ExtraFPNBlock):
    """Checks its arguments and returns new lists."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        assert len(results) == len(x) == len(names) == 2
        assert [m.shape[1] for m in x] == [7, 9] and [m.shape[1] for m in results] == [6, 6]
        self.names = list(names)
        return [2 * p for p in results], [f"{name}x2" for name in names]


def test_a_custom_block_may_replace_everything() -> None:
    network = FeaturePyramidNetwork([7, 9], 6)
    c4, c5 = torch.randn(1, 7, 4, 4), torch.randn(1, 9, 2, 2)
    plain = network([c4, c5])
    network.extra_blocks = Doubled()
    doubled = network({"a": c4, "b": c5})
    assert list(doubled) == ["ax2", "bx2"]
    for p, q in zip(plain, doubled.values(), strict=True):
        assert torch.equal(2 * p, q)
    network([c4, c5])
    assert network.extra_blocks.names == ["0", "1"], "torchvision's names for a sequence"


def test_torchvisions_own_block_is_taken() -> None:
    base = type("ExtraFPNBlock", (nn.Module,), {"__module__": "torchvision.ops.feature_pyramid_network"})
    foreign = type("LastLevelMaxPool", (base,), {"forward": LastLevelMaxPool.forward})
    results = FeaturePyramidNetwork([7], 6, foreign())({"0": torch.randn(1, 7, 4, 4)})
    assert list(results) == ["0", "pool"]


def test_errors() -> None:
    x = [torch.randn(1, 7, 4, 4)]
    with pytest.raises(NotImplementedError, match="ExtraFPNBlock does not define forward"):
        FeaturePyramidNetwork([7], 6, ExtraFPNBlock())(x)

    class Forgetful(ExtraFPNBlock):
        def forward(self, results: Any, x: Any, names: Any) -> Any:
            return [*results, results[-1]], names

    with pytest.raises(ValueError, match="extra_blocks: Forgetful returned 2 maps and 1 names"):
        FeaturePyramidNetwork([7], 6, Forgetful())(x)
