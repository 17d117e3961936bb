"""A bottleneck ResNet and its Feature Pyramid Network in one module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fpn_kernels.modules.extra_blocks import ExtraFPNBlock, LastLevelMaxPool
from fpn_kernels.modules.feature_pyramid import FeaturePyramidNetwork, check_integer, check_norm_layer
from fpn_kernels.modules.resnet import NormLayer, ResNet

_STAGES = (2, 3, 4, 5)


class ResNetFPN(nn.Module):
    """The bottom-up pathway `body` (a `ResNet`) and the pyramid `fpn` (a `FeaturePyramidNetwork`).

    The keys are those of torchvision's `BackboneWithFPN` (``body.conv1.weight``, ``fpn.inner_blocks.0.0.weight``).  So
    the backbone of a torchvision detector loads as a whole, and classification weights load into the body
    (``model.body.load_state_dict(...)``, strict except for ``fc.*``).  Nothing is downloaded.  The example shows the
    options of common systems.

    Args:
        layers: blocks per stage of the ResNet.
        out_channels: channels of every map of the pyramid.
        levels: the C maps that enter the pyramid, ascending, of 2, 3, 4, 5.
        mode: "nearest", "nearest-exact" or "bilinear", as in `FeaturePyramidNetwork`.
        fuse_type: "sum" or "avg", as in `FeaturePyramidNetwork`.
        smooth: the levels with an output convolution (default: all of `levels`); the others return the merged map.
        extra_blocks: "pool" for P6 as every second pixel of P5, None for no further level, or an `ExtraFPNBlock`.
        norm_layer: makes the norm of a number of channels in the ResNet, e.g. `FrozenBatchNorm2d`.
        fpn_norm_layer: the same in the pyramid, which has no norms by default.
        stride_in_1x1: put a block's stride into its first 1x1 convolution, not into the 3x3.
        freeze_at: as in Detectron2: 1 freezes the stem, 2 the first stage too, and so on; 0 nothing.
        width: channels of the stem; C2 has four times as many.
        return_tuple: return a tuple of maps, finest first, instead of an `OrderedDict`.

    Shape:
        Images ``[N, 3, H, W]`` to maps ``p_l`` of ``[N, out_channels, ceil(H / 2**l), ceil(W / 2**l)]``.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument of the wrong value, named in the message.

    Dtypes and layout:
        Those of the parameters: float16, bfloat16, float32 or float64; NCHW or NHWC.  The backbone runs PyTorch's
        convolutions; the pyramid is a `FeaturePyramidNetwork`.

    Cost:
        The bytes and operations of the backbone, plus those of `FeaturePyramidNetwork`.

    Source:
        Deep Residual Learning, arXiv 1512.03385, and Feature Pyramid Networks, arXiv 1612.03144; the names are those of
        torchvision's `BackboneWithFPN`.

    Example:
        ```python
        from fpn_kernels import FrozenBatchNorm2d, LastLevelP6P7, ResNetFPN, resnet50_fpn

        # the paper; torchvision's maps under other names
        model = resnet50_fpn()
        # the single-file ResNet FPN: (p2, p3, p4, p5), p5 not smoothed
        model = resnet50_fpn(mode="bilinear", smooth=(2, 3, 4), extra_blocks=None, return_tuple=True)
        # kuangliu's FPN101()
        model = ResNetFPN((2, 2, 2, 2), mode="bilinear", smooth=(2, 3, 4), extra_blocks=None, return_tuple=True)
        # Detectron2: p2..p6 by name; its weights expect BGR images
        detectron2 = {"norm_layer": FrozenBatchNorm2d, "stride_in_1x1": True, "freeze_at": 2}
        model = resnet50_fpn(**detectron2)
        # Detectron2's RetinaNet: p3..p7, P6 and P7 from res5
        model = resnet50_fpn(levels=(3, 4, 5), extra_blocks=LastLevelP6P7(2048, 256), **detectron2)
        ```
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        out_channels: int = 256,
        *,
        levels: Sequence[int] = _STAGES,
        mode: str = "nearest",
        fuse_type: str = "sum",
        smooth: Sequence[int] | None = None,
        extra_blocks: ExtraFPNBlock | str | None = "pool",
        norm_layer: NormLayer = nn.BatchNorm2d,
        fpn_norm_layer: Callable[..., nn.Module] | None = None,
        stride_in_1x1: bool = False,
        freeze_at: int = 0,
        width: int = 64,
        return_tuple: bool = False,
    ) -> None:
        super().__init__()
        smooth = levels if smooth is None else smooth
        _check_options(layers, levels, smooth, extra_blocks, norm_layer, freeze_at, width)
        self.levels = tuple(levels)
        self.return_tuple = return_tuple
        self.out_channels = out_channels
        self.body = ResNet(layers, width=width, norm_layer=norm_layer, stride_in_1x1=stride_in_1x1, freeze_at=freeze_at)
        self.fpn = FeaturePyramidNetwork(
            [self.body.out_channels[level - 2] for level in self.levels],
            out_channels,
            LastLevelMaxPool() if isinstance(extra_blocks, str) else extra_blocks,
            fpn_norm_layer,
            mode=mode,
            fuse_type=fuse_type,
        )
        for index, level in enumerate(self.levels):
            if level not in smooth:
                self.fpn.layer_blocks[index] = nn.Identity()

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor] | tuple[Tensor, ...]:
        """Computes the pyramid of a batch of images.

        Args:
            image: ``[N, 3, H, W]``, floating point, normalised as the weights require; any H, W >= 1.

        Returns:
            An `OrderedDict` ``p2, p3, ...``, one name per level and extra level, or a tuple of the same maps with
            ``return_tuple=True``.  ``p_l`` is ``[N, out_channels, ceil(H / 2**l), ceil(W / 2**l)]``.

        Raises:
            TypeError, ValueError: `image` has another type, dtype or shape.
        """
        _check_image(image)
        stages = self.body(image)
        maps = self.fpn([stages[level - 2] for level in self.levels])
        if self.return_tuple:
            return maps  # type: ignore[no-any-return]
        last = self.levels[-1]
        names = [*self.levels, *range(last + 1, last + 1 + len(maps) - len(self.levels))]
        return OrderedDict((f"p{level}", p) for level, p in zip(names, maps, strict=True))

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.compile, torch.export or"
            " torch.jit.trace, or load its state_dict into torchvision's BackboneWithFPN and script that"
        )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, return_tuple={self.return_tuple}"


def resnet50_fpn(out_channels: int = 256, **options: Any) -> ResNetFPN:
    """ResNet-50 with its pyramid.

    Args:
        out_channels: channels of every map of the pyramid.
        **options: those of `ResNetFPN`.

    Returns:
        A `ResNetFPN`, which takes images ``[N, 3, H, W]``.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument of the wrong value, named in the message.

    Cost:
        The bytes and operations of a `ResNetFPN` with 16 blocks.

    Source:
        Deep Residual Learning, arXiv 1512.03385, table 1.
    """
    return ResNetFPN((3, 4, 6, 3), out_channels, **options)


def resnet101_fpn(out_channels: int = 256, **options: Any) -> ResNetFPN:
    """ResNet-101 with its pyramid.

    Args:
        out_channels: channels of every map of the pyramid.
        **options: those of `ResNetFPN`.

    Returns:
        A `ResNetFPN`, which takes images ``[N, 3, H, W]``.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument of the wrong value, named in the message.

    Cost:
        The bytes and operations of a `ResNetFPN` with 33 blocks.

    Source:
        Deep Residual Learning, arXiv 1512.03385, table 1.
    """
    return ResNetFPN((3, 4, 23, 3), out_channels, **options)


def _check_options(
    layers: Any, levels: Any, smooth: Any, extra_blocks: Any, norm_layer: Any, freeze_at: Any, width: Any
) -> None:
    for argument, value in (("layers", layers), ("levels", levels), ("smooth", smooth)):
        if not isinstance(value, Sequence) or not all(type(item) is int for item in value):
            raise TypeError(f"{argument}: expected a sequence of integers, got {value!r}")
    if len(layers) != 4 or min(layers) < 1:
        raise ValueError(f"layers: expected four numbers of blocks, each at least 1, got {tuple(layers)}")
    if not levels or not set(levels) <= set(_STAGES) or sorted(set(levels)) != list(levels):
        raise ValueError(f"levels: expected ascending levels out of {_STAGES}, got {tuple(levels)}")
    if any(level not in levels for level in smooth):
        raise ValueError(f"smooth: expected levels out of {tuple(levels)}, got {tuple(smooth)}")
    if isinstance(extra_blocks, str) and extra_blocks != "pool":
        raise ValueError(f"extra_blocks: expected 'pool', an ExtraFPNBlock or None, got {extra_blocks!r}")
    check_norm_layer(norm_layer)
    check_integer("freeze_at", freeze_at, 0, 5)
    check_integer("width", width)


def _check_image(image: Any) -> None:
    if isinstance(image, torch.fx.Proxy) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return  # a trace knows neither type nor shape
    if not isinstance(image, Tensor):
        raise TypeError(f"image: expected a Tensor [N, 3, H, W], got {type(image).__name__}")
    if not image.is_floating_point():
        raise TypeError(f"image: expected a floating-point dtype, got {image.dtype}")
    if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] < 1 or image.shape[3] < 1:
        raise ValueError(f"image: expected [N, 3, H, W] with H, W >= 1, got shape {tuple(image.shape)}")
