"""Modules to export, exported programs, and the check of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import torch
from samples import random_map
from torch import Tensor, nn
from twins import CHANNELS, SIZES, WIDTH, scramble

import fpn_kernels
from fpn_kernels import FeaturePyramidNetwork, LastLevelMaxPool

# torch copies its own deprecated classes while it decomposes; what it says of this library still fails a test.
QUIET = "ignore:.*LeafSpec.*:FutureWarning"
MODES = ["nearest", "nearest-exact", "bilinear"]
# Sizes at which the float32 index is not the rational one (30 to 58, 98 to 194, 116 to 230).
UNEVEN = [(194, 230), (98, 116), (50, 58), (25, 30)]


class Merge(nn.Module):
    def __init__(self, mode: str = "nearest", gain: float = 1.0) -> None:
        super().__init__()
        self.mode, self.gain = mode, gain
        self.eval()

    def forward(self, top: Tensor, lateral: Tensor) -> Tensor:
        return fpn_kernels.upsample_add(top, lateral, mode=self.mode, gain=self.gain)


def neck(dtype: torch.dtype = torch.float32, **options: Any) -> FeaturePyramidNetwork:
    module = FeaturePyramidNetwork(CHANNELS, WIDTH, LastLevelMaxPool(), **options)
    scramble(module)
    return module.to(dtype).eval()


def features(
    batch: int = 2, dtype: torch.dtype = torch.float32, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[Tensor]:
    return [random_map((batch, c, *size), dtype) for c, size in zip(CHANNELS, sizes, strict=True)]


def dynamic_shapes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Batch, height and width of every map, each on its own."""
    auto = torch.export.Dim.AUTO
    dims = {0: auto, 2: auto, 3: auto}
    return tuple([dims for _ in each] if isinstance(each, list) else dims for each in arguments)


def exported(module: nn.Module, arguments: tuple[Any, ...], *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = dynamic_shapes(arguments) if dynamic else None
    return torch.export.export(module, arguments, dynamic_shapes=shapes)


def decomposed(module: nn.Module, arguments: tuple[Any, ...], *, dynamic: bool) -> torch.export.ExportedProgram:
    program = exported(module, arguments, dynamic=dynamic)
    assert own_operators(program), "a module that never calls the library would prove nothing"
    program = program.run_decompositions(fpn_kernels.decompositions())
    assert own_operators(program) == set()
    return program


def own_operators(program: torch.export.ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target for target in targets if target.startswith("fpn_kernels")}


def assert_pyramid(results: Sequence[Tensor], module: FeaturePyramidNetwork, maps: Sequence[Tensor]) -> None:
    """Within eight roundings of float64: three convolutions, three merges and the order of a runtime's own sums.

    In bilinear mode, the weight of a pixel has besides the absolute error of its float32 position.
    """
    twin = FeaturePyramidNetwork(CHANNELS, WIDTH, LastLevelMaxPool(), mode=module.mode, fuse_type=module.fuse_type)
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = twin.double().eval()([feature.double() for feature in maps])
    assert len(results) == len(expected)
    position = max(maps[0].shape[2:]) if module.mode == "bilinear" else 0
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == maps[0].dtype
        assert result.shape == exact.shape
        allowed = 8 * oracle.rounding(result.dtype) + position * oracle.rounding(torch.float32)
        assert oracle.error(result, exact) <= allowed
