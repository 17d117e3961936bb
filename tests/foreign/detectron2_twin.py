"""Detectron2: `FPN` over a `bottom_up` network, its `Conv2d` with the norm inside, its two top blocks."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module] | None


class Conv2d(nn.Conv2d):
    def __init__(self, *arguments: Any, norm: nn.Module | None = None, activation: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        for step in (self.norm, self.activation):
            x = x if step is None else step(x)
        return x


class LastLevelMaxPool(nn.Module):
    num_levels, in_feature = 1, "p5"

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::2, ::2]]


class LastLevelP6P7(nn.Module):
    num_levels = 2

    def __init__(self, cin: int, cout: int, in_feature: str = "res5") -> None:
        super().__init__()
        self.in_feature = in_feature
        self.p6, self.p7 = nn.Conv2d(cin, cout, 3, 2, 1), nn.Conv2d(cout, cout, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        p6 = self.p6(x)
        return [p6, self.p7(p6.relu())]


class BottomUp(nn.Module):
    """res2..res5 at strides 4 to 32, by one strided convolution each."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        for stage, (cin, cout) in enumerate(zip([4, *channels], channels, strict=False), start=2):
            self.add_module(f"res{stage}", nn.Conv2d(cin, cout, 3, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x).relu(), {}
        for stage in range(2, 6):
            x = maps[f"res{stage}"] = getattr(self, f"res{stage}")(x).relu()
        return maps


class Backbone(nn.Module, metaclass=abc.ABCMeta):
    @abc.abstractmethod
    def forward(self, x: Tensor) -> Any: ...


class FPN(Backbone):
    def __init__(
        self,
        bottom_up: nn.Module,
        in_features: list[str],
        channels: list[int],
        out_channels: int,
        norm: Norm = None,
        top_block: Any = None,
        fuse_type: str = "sum",
    ) -> None:
        super().__init__()
        self.lateral_convs: list[nn.Module] = []
        self.output_convs: list[nn.Module] = []
        stages = [int(name.removeprefix("res")) for name in in_features]
        for stage, cin in zip(stages, channels, strict=True):
            for kind, kernel, source in (("lateral", 1, cin), ("output", 3, out_channels)):
                normed = None if norm is None else norm(out_channels)
                conv = Conv2d(source, out_channels, kernel, padding=kernel // 2, bias=norm is None, norm=normed)
                self.add_module(f"fpn_{kind}{stage}", conv)
                getattr(self, f"{kind}_convs").insert(0, conv)
        self.bottom_up, self.top_block = bottom_up, top_block
        self.in_features = tuple(in_features)
        extra = 0 if top_block is None else top_block.num_levels
        self._out_features = [f"p{stage}" for stage in [*stages, *range(stages[-1] + 1, stages[-1] + 1 + extra)]]
        self._fuse_type = fuse_type

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.bottom_up(x)
        merged, results = None, []
        for name, lateral, output in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs, strict=True
        ):
            lateral = lateral(maps[name])
            if merged is not None:
                lateral = lateral + F.interpolate(merged, scale_factor=2.0)
                lateral = lateral / 2 if self._fuse_type == "avg" else lateral
            merged = lateral
            results = [output(merged), *results]
        if self.top_block is not None:
            name = self.top_block.in_feature
            results += self.top_block(maps[name] if name in maps else results[self._out_features.index(name)])
        return dict(zip(self._out_features, results, strict=True))
