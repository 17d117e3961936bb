"""Pyramids to fuse: each dialect with each of its options."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from foreign import detectron2_twin, effdet_twin, mmdet_twin, sam2_twin, smp_twin, torchvision_twin
from oracle import error
from resnet_twins import NamedLayersFPN, kuangliu_fpn101, single_file_fpn
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from twins import CHANNELS, NAMES, SIZES, WIDTH, group_norm, scramble

from fpn_kernels.modules import FrozenBatchNorm2d

MERGE = ["lateral_connection"]
SEPARATE = ["upsample_add"]
DOUBLING = [(24, 40), (12, 20), (6, 10), (3, 5)]
RES = ["res2", "res3", "res4", "res5"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A module to fuse.

    Attributes:
        name: the dialect and the option.
        make: makes it, in any state.
        example: the arguments of a call.
        calls: the pathway's operators in one call of the fused module in eval mode.
        dialect: its name in a report.
    """

    name: str
    make: Callable[[], nn.Module]
    example: Callable[[], tuple[Any, ...]]
    calls: list[str]
    dialect: str


def _maps(sizes: list[tuple[int, int]], channels: list[int] = CHANNELS) -> list[Tensor]:
    return [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


def _torchvision() -> list[Case]:
    def case(name: str, calls: list[str], extra: Callable[[], nn.Module] | None = None, norm: Any = None) -> Case:
        return Case(
            f"torchvision-{name}",
            lambda: torchvision_twin.FeaturePyramidNetwork(CHANNELS, WIDTH, extra() if extra else None, norm),
            lambda: (OrderedDict(zip(NAMES, _maps(SIZES), strict=True)),),
            calls,
            "torchvision FeaturePyramidNetwork",
        )

    return [
        case("plain", 4 * MERGE),
        case("pool", 4 * MERGE, torchvision_twin.LastLevelMaxPool),
        case("p6p7-from-c5", 4 * MERGE, lambda: torchvision_twin.LastLevelP6P7(CHANNELS[-1], WIDTH)),
        case("p6p7-from-p5", 4 * MERGE, lambda: torchvision_twin.LastLevelP6P7(WIDTH, WIDTH)),
        case("bn", 4 * MERGE, None, nn.BatchNorm2d),
        case("frozen-bn", 4 * MERGE, None, FrozenBatchNorm2d),
        case("gn", 3 * SEPARATE, None, group_norm),
    ]


def _detectron2() -> list[Case]:
    def case(
        name: str, calls: list[str], features: list[str] = RES, norm: Any = None, top: Any = None, **options: Any
    ) -> Case:
        channels = dict(zip(RES, CHANNELS, strict=True))

        def make() -> nn.Module:
            used = [channels[name] for name in features]
            bottom_up = detectron2_twin.BottomUp(CHANNELS)
            return detectron2_twin.FPN(bottom_up, features, used, WIDTH, norm, top and top(), **options)

        return Case(f"detectron2-{name}", make, lambda: (torch.randn(2, 3, 64, 96),), calls, "Detectron2 FPN")

    p6p7 = detectron2_twin.LastLevelP6P7
    return [
        case("plain", 4 * MERGE),
        case("pool", 4 * MERGE, top=detectron2_twin.LastLevelMaxPool),
        case("avg", 4 * MERGE, fuse_type="avg"),
        case("retinanet", 3 * MERGE, RES[1:], top=lambda: p6p7(CHANNELS[-1], WIDTH)),
        case("p6p7-from-p5", 3 * MERGE, RES[1:], top=lambda: p6p7(WIDTH, WIDTH, "p5")),
        case("p6p7-from-outside", 2 * MERGE, RES[1:3], top=lambda: p6p7(CHANNELS[-1], WIDTH)),
        case("bn", 4 * MERGE, norm=nn.BatchNorm2d),
        case("frozen-bn", 4 * MERGE, norm=FrozenBatchNorm2d, fuse_type="avg"),
        case("gn", 3 * SEPARATE, norm=group_norm),
        case("syncbn", 4 * MERGE, norm=nn.SyncBatchNorm),
    ]


def _mmdet() -> list[Case]:
    def case(name: str, calls: list[str], sizes: Any = SIZES, num_outs: int = 5, **options: Any) -> Case:
        return Case(
            f"mmdet-{name}",
            lambda: mmdet_twin.FPN(CHANNELS, WIDTH, num_outs, **options),
            lambda: (tuple(_maps(sizes)),),
            calls,
            "MMDetection FPN",
        )

    return [
        case("pool", 4 * MERGE),
        case("two-pools", 4 * MERGE, num_outs=6),
        case("no-extra", 4 * MERGE, num_outs=4),
        case("start-level", 3 * MERGE, start_level=1, add_extra_convs="on_input"),
        case("end-level", 2 * MERGE, num_outs=2, start_level=1, end_level=3),
        case("on-input", 4 * MERGE, num_outs=6, add_extra_convs="on_input"),
        case("on-lateral", 4 * MERGE, num_outs=6, add_extra_convs="on_lateral"),
        case("on-output", 4 * MERGE, num_outs=6, add_extra_convs="on_output"),
        case("true", 4 * MERGE, num_outs=6, add_extra_convs=True),
        case("relu", 4 * MERGE, num_outs=7, add_extra_convs="on_output", relu_before_extra_convs=True),
        case("bn", 4 * MERGE, norm="BN", add_extra_convs="on_input"),
        case("gn", 3 * SEPARATE, norm="GN"),
        case("no-norm-on-lateral", 4 * MERGE, norm="GN", no_norm_on_lateral=True),
        case("activation", 3 * SEPARATE, act=nn.ReLU),
        case("bilinear", 4 * MERGE, upsample_cfg={"mode": "bilinear", "align_corners": False}),
        case("nearest-exact", 4 * MERGE, upsample_cfg={"mode": "nearest-exact"}),
        case("scale-factor", 4 * MERGE, DOUBLING, upsample_cfg={"mode": "nearest", "scale_factor": 2}),
        case(
            "scale-factor-3",
            4 * MERGE,
            [(54, 27), (18, 9), (6, 3), (2, 1)],
            upsample_cfg={"mode": "bilinear", "scale_factor": 3},
        ),
    ]


def _named_layers() -> list[Case]:
    def case(name: str, make: Callable[[], nn.Module]) -> Case:
        dialect = "single-file FPN (toplayer, latlayer, smooth)"
        return Case(f"named-{name}", make, lambda: (torch.randn(2, 3, 75, 118),), 4 * MERGE, dialect)

    def nearest(mode: str) -> NamedLayersFPN:
        network = kuangliu_fpn101(4)
        network.mode = mode
        return network

    return [
        case("single-file", lambda: single_file_fpn([1, 2, 1, 1], 4)),
        case("kuangliu", lambda: kuangliu_fpn101(4)),
        case("nearest", lambda: nearest("nearest")),
        case("nearest-exact", lambda: nearest("nearest-exact")),
    ]


def _sam2() -> list[Case]:
    def case(name: str, calls: list[str], **options: Any) -> Case:
        def make() -> nn.Module:
            return sam2_twin.FpnNeck(sam2_twin.PositionEncoding(), WIDTH, CHANNELS[::-1], **options)

        return Case(f"sam2-{name}", make, lambda: (_maps(DOUBLING),), calls, "SAM 2 FpnNeck")

    return [
        case("published", 4 * MERGE, fpn_interp_model="nearest", fpn_top_down_levels=[2, 3]),
        case("bilinear-avg", 4 * MERGE, fuse_type="avg"),
        case("no-merge", 4 * MERGE, fpn_top_down_levels=[]),
        case("3x3", 3 * SEPARATE, kernel_size=3),
    ]


def _smp() -> list[Case]:
    def case(mode: str) -> Case:
        def make() -> nn.Module:
            decoder = smp_twin.FPNDecoder(CHANNELS, WIDTH, mode)
            decoder.dropout.p = 0.0  # random results cannot be compared
            return decoder

        dialect = "segmentation_models_pytorch FPNBlock"
        return Case(f"smp-{mode}", make, lambda: (_maps(DOUBLING),), 3 * MERGE, dialect)

    return [case(mode) for mode in ("nearest", "bilinear", "nearest-exact")]


def _effdet() -> list[Case]:
    def case(name: str, calls: list[str], **options: Any) -> Case:
        sizes, channels = [(16, 24), (8, 12), (4, 6)], [8, 10, WIDTH]
        return Case(
            f"effdet-{name}",
            lambda: effdet_twin.BiFpnLayer(channels, WIDTH, sizes, **options),
            lambda: (_maps(sizes, channels),),
            calls,
            "EfficientDet FpnCombine",
        )

    return [
        case("size", 2 * MERGE),
        case("scale", 2 * MERGE, by="scale"),
        case("bn", 2 * MERGE, norm=True),
        case("bilinear", 2 * MERGE, mode="bilinear"),
    ]


CASES = [*_torchvision(), *_detectron2(), *_mmdet(), *_named_layers(), *_sam2(), *_smp(), *_effdet()]
ONE_EACH = [case for n, case in enumerate(CASES) if case.dialect not in {c.dialect for c in CASES[:n]}]


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def requiring_grad(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(), arguments)


def network_of(cls: type[nn.Module] = torchvision_twin.FeaturePyramidNetwork, norm: Any = None) -> Any:
    """torchvision's pyramid, or a derived class, in eval mode with scrambled weights."""
    network = cls(CHANNELS, WIDTH, None, norm)
    scramble(network)
    return network.eval()


def assert_same_output(actual: Any, expected: Any, limit: float = 2e-5) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    for left, right in zip(leaves(actual), leaves(expected), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert error(left.detach(), right.detach().double()) < limit


def assert_same_gradients(model: nn.Module, twin: nn.Module, example: Any) -> None:
    """Compare outputs, gradients of parameters and inputs, and buffers after one forward and backward."""
    x, y = requiring_grad(example), requiring_grad(example)
    actual, expected = model(*x), twin(*y)
    assert_same_output(actual, expected)
    weights = [torch.randn_like(leaf) for leaf in leaves(expected)]
    for results in (actual, expected):
        sum((leaf * weight).sum() for leaf, weight in zip(leaves(results), weights, strict=True)).backward()
    theirs = dict(twin.named_parameters())
    pairs = [(name, p.grad, theirs[name].grad) for name, p in model.named_parameters()]
    pairs += [("input", a.grad, b.grad) for a, b in zip(leaves(x), leaves(y), strict=True)]
    for name, got, want in pairs:
        assert (got is None) == (want is None), name
        if want is not None:
            # Under BatchNorm in training, the gradient of a 3x3 convolution nearly cancels.
            assert (got - want).norm() <= 2e-5 * want.norm() + 2e-6, name
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)
