"""The weight and bias of other libraries' blocks of convolution and norm, for the fused calls."""

from __future__ import annotations

from torch import Tensor, nn

from fpn_kernels.modules.fusing import convolution_parameters, fused_parameters, is_observed


def defining_class(module: nn.Module) -> type:
    """The class whose forward a module runs."""
    return next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)


def block_parameters(block: nn.Module, kernel_size: int) -> tuple[Tensor, Tensor | None] | None:
    """`fused_parameters` for the blocks of every dialect.

    Knows Detectron2's ``Conv2d`` (its norm is a child of the convolution), MMCV's ``ConvModule`` and EfficientDet's
    ``ConvBnAct2d``, by their name and their parts.  With an activation, an unusual order, hooks, or anything else
    that a weight and a bias do not say, a block is run as the module it is.

    Args:
        block: a lateral or output block.
        kernel_size: as in `fused_parameters`.
    """
    name = defining_class(block).__name__
    if name == "Conv2d" and isinstance(block, nn.Conv2d) and hasattr(block, "norm") and hasattr(block, "activation"):
        if block.activation is not None:
            return None
        return convolution_parameters(block, _module(block.norm), kernel_size, forward=type(block).forward)
    if name in ("ConvModule", "ConvBnAct2d") and not is_observed(block):
        parts = _conv_module(block) if name == "ConvModule" else _conv_bn_act(block)
        return None if parts is None else convolution_parameters(*parts, kernel_size)
    return fused_parameters(block, kernel_size)


_Parts = tuple[nn.Module, nn.Module | None] | None


def _conv_module(block: nn.Module) -> _Parts:
    if getattr(block, "with_activation", True) or getattr(block, "with_explicit_padding", False):
        return None
    if not getattr(block, "with_norm", True):
        return block.conv, None  # type: ignore[return-value]
    order = tuple(getattr(block, "order", ("conv", "norm", "act")))
    if order.index("norm") < order.index("conv"):
        return None
    return block.conv, _module(block.norm)  # type: ignore[return-value]


def _conv_bn_act(block: nn.Module) -> _Parts:
    if getattr(block, "act", None) is not None:
        return None
    return block.conv, _module(block.bn)  # type: ignore[return-value]


def _module(value: object) -> nn.Module | None:
    return value if isinstance(value, nn.Module) else None
