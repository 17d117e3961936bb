"""MMDetection: `FPN` with its options, over MMCV's `ConvModule`."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {"BN": ("bn", nn.BatchNorm2d), "GN": ("gn", lambda channels: nn.GroupNorm(4, channels))}


class ConvModule(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int, norm: str | None, act: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=norm is None)
        self.order = ("conv", "norm", "act")
        self.with_norm, self.with_activation, self.with_explicit_padding = norm is not None, act is not None, False
        self.norm_name = None
        if norm is not None:
            self.norm_name, make = NORMS[norm]
            self.add_module(self.norm_name, make(cout))
        if act is not None:
            self.activate = act()

    @property
    def norm(self) -> Any:
        return None if self.norm_name is None else getattr(self, self.norm_name)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        x = self.conv(x)
        x = self.norm(x) if self.with_norm and norm else x
        return self.activate(x) if self.with_activation and activate else x


class BaseModule(nn.Module, metaclass=abc.ABCMeta):
    pass


class FPN(BaseModule):
    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        num_outs: int,
        *,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        norm: str | None = None,
        act: Any = None,
        upsample_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_outs, self.start_level = in_channels, num_outs, start_level
        self.backbone_end_level = len(in_channels) if end_level == -1 else end_level
        self.add_extra_convs: bool | str = "on_input" if add_extra_convs is True else add_extra_convs
        self.relu_before_extra_convs, self.no_norm_on_lateral = relu_before_extra_convs, no_norm_on_lateral
        self.upsample_cfg = {"mode": "nearest"} if upsample_cfg is None else upsample_cfg.copy()
        used = in_channels[start_level : self.backbone_end_level]
        lateral_norm = None if no_norm_on_lateral else norm
        self.lateral_convs = nn.ModuleList(ConvModule(cin, out_channels, 1, 1, lateral_norm, act) for cin in used)
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, 1, norm, act) for _ in used)
        for index in range(num_outs - len(used) if add_extra_convs else 0):
            cin = used[-1] if index == 0 and self.add_extra_convs == "on_input" else out_channels
            self.fpn_convs.append(ConvModule(cin, out_channels, 3, 2, norm, act))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        assert len(inputs) == len(self.in_channels)
        used = inputs[self.start_level : self.backbone_end_level]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, used, strict=True)]
        for level in range(len(used) - 1, 0, -1):
            size = {} if "scale_factor" in self.upsample_cfg else {"size": laterals[level - 1].shape[-2:]}
            laterals[level - 1] = laterals[level - 1] + F.interpolate(laterals[level], **size, **self.upsample_cfg)
        results = [conv(m) for conv, m in zip(self.fpn_convs, laterals, strict=False)]
        sources = {"on_input": used[-1], "on_lateral": laterals[-1], "on_output": results[-1]}
        while len(results) < self.num_outs:
            if not self.add_extra_convs:
                results.append(results[-1][:, :, ::2, ::2])
                continue
            first = len(results) == len(used)
            x = sources[str(self.add_extra_convs)] if first else results[-1]
            x = x.relu() if self.relu_before_extra_convs and not first else x
            results.append(self.fpn_convs[len(results)](x))
        return tuple(results)
