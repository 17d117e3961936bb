"""The levels above the pyramid: P6 by subsampling (Faster R-CNN) or P6 and P7 by convolutions (RetinaNet)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ExtraFPNBlock(nn.Module):
    """Base class of the blocks that extend a pyramid; derive your own block from it.

    A block is called once, after the output convolutions, with three lists, finest first.  It may extend them in place.

    Shape:
        The P maps ``[N, out_channels, H_l, W_l]`` and the C maps ``[N, in_channels_l, H_l, W_l]`` to the P maps and the
        added maps.

    Raises:
        NotImplementedError: the subclass has no ``forward``.

    Dtypes and layout:
        Those of the pyramid: float16, bfloat16, float32 or float64; NCHW or NHWC, each level as its C map.

    Cost:
        The bytes and operations of the subclass, which is not fused.

    Source:
        torchvision's class of the same name, which is accepted in its place.
    """

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Extends the pyramid.

        Args:
            results: the P maps, ``[N, out_channels, H_l, W_l]`` each.
            x: the C maps of the same levels, ``[N, in_channels_l, H_l, W_l]`` each.
            names: the names of `results`.

        Returns:
            The extended maps and one name per map.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward(results, x, names)")


class LastLevelMaxPool(ExtraFPNBlock):
    """P6 for Faster R-CNN: every second pixel of the coarsest map (max-pooling with kernel 1 and stride 2).

    The new map is named "pool", as in torchvision.  Only the anchors of the largest boxes use it.

    Shape:
        P5 ``[N, C, H, W]`` to P6 ``[N, C, ceil(H / 2), ceil(W / 2)]``.

    Raises:
        RuntimeError: the coarsest map is empty (PyTorch's own message).

    Dtypes and layout:
        Those of P5: float16, bfloat16, float32 or float64; NCHW or NHWC.

    Cost:
        ``2 N C ceil(H / 2) ceil(W / 2) itemsize`` bytes.

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, section 4.1, footnote; torchvision's class of the same name;
        `torch.nn.functional.max_pool2d`.
    """

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        # Not a slice: a view would keep all of P5 alive.
        results.append(F.max_pool2d(results[-1], kernel_size=1, stride=2, padding=0))
        names.append("pool")
        return results, names


class LastLevelP6P7(ExtraFPNBlock):
    """P6 and P7 for RetinaNet: 3x3 convolutions with stride 2, ``p7 = conv(relu(p6))``.

    P6 is computed from P5 if ``in_channels == out_channels``, else from C5, as in torchvision.  Detectron2's block
    "from res5" is ``LastLevelP6P7(2048, 256)``.

    Args:
        in_channels: channels of the map that P6 is computed from.
        out_channels: channels of P6 and P7.

    Shape:
        A map ``[N, in_channels, H, W]`` to P6 ``[N, out_channels, ceil(H / 2), ceil(W / 2)]``; P7 has half its sides.

    Raises:
        RuntimeError: the map has another number of channels (PyTorch's own message).

    Dtypes and layout:
        Those of the parameters: float16, bfloat16, float32 or float64; NCHW or NHWC.

    Cost:
        PyTorch's convolutions: at least the map, the weights, P6 and P7 once, and P6 read once more, in bytes
        ``(N Cin H W + 9 Cin C + 9 C C + 2 C + 2 N C H W / 4 + N C H W / 16) itemsize``.

    Source:
        Focal Loss for Dense Object Detection, arXiv 1708.02002; torchvision's class of the same name.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for convolution in (self.p6, self.p7):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        self.use_P5 = in_channels == out_channels  # torchvision's attribute

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(results[-1] if self.use_P5 else x[-1])
        p7 = self.p7(F.relu(p6))
        results.extend([p6, p7])
        names.extend(["p6", "p7"])
        return results, names
