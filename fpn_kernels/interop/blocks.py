"""The weight and bias of other libraries' blocks of convolution and norm, for the fused calls."""

from __future__ import annotations

from typing import Any

from torch import nn

from fpn_kernels.modules.alterations import defining_class, runs_own_forward
from fpn_kernels.modules.fusing import Parameters, convolution_parameters, fused_parameters


def block_parameters(block: nn.Module, kernel_size: int) -> Parameters | None:
    """`fused_parameters` for the blocks of every dialect.

    Knows Detectron2's ``Conv2d`` (its norm is a child of the convolution), MMCV's ``ConvModule`` and EfficientDet's
    ``ConvBnAct2d``, by their name and their parts.  With an activation, an unusual order, hooks, or anything else
    that a weight and a bias do not say, a block is run as the module it is.

    Args:
        block: a lateral or output block.
        kernel_size: as in `fused_parameters`.
    """
    name = defining_class(type(block)).__name__
    parts: _Parts = None
    if name == "Conv2d" and isinstance(block, nn.Conv2d) and hasattr(block, "norm") and hasattr(block, "activation"):
        parts = (block, block.norm) if block.activation is None else None
    elif name == "ConvModule":
        parts = _conv_module(block)
    elif name == "ConvBnAct2d":
        parts = _conv_bn_act(block)
    else:
        return fused_parameters(block, kernel_size)
    if parts is None or not runs_own_forward(block):
        return None
    convolution, norm = parts
    if norm is not None and not isinstance(norm, nn.Module):
        return None
    if convolution is block:
        return convolution_parameters(block, norm, kernel_size, forward=type(block).forward)
    return convolution_parameters(convolution, norm, kernel_size)


_Parts = tuple[nn.Module, Any] | None


def _conv_module(block: Any) -> _Parts:
    if getattr(block, "with_activation", True) or getattr(block, "with_explicit_padding", False):
        return None
    if not getattr(block, "with_norm", True):
        return block.conv, None
    order = tuple(getattr(block, "order", ("conv", "norm", "act")))
    return None if order.index("norm") < order.index("conv") else (block.conv, block.norm)


def _conv_bn_act(block: Any) -> _Parts:
    return (block.conv, block.bn) if getattr(block, "act", None) is None else None
