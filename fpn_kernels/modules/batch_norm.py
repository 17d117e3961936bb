"""BatchNorm with fixed statistics: the module, and its folding into the convolution before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn_kernels.modules.alterations import defining_class, runs_own_forward, torch_method

_TENSORS = ("weight", "bias", "running_mean", "running_var")


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine parameters are constants (buffers), as in detectors.

    Loading drops the ``num_batches_tracked`` of an `nn.BatchNorm2d` checkpoint.

    Args:
        num_features: channels C of the input.
        eps: added to the variance.

    Shape:
        ``[N, C, H, W]`` to the same.

    Raises:
        RuntimeError: the input has another number of channels (PyTorch's own message).

    Dtypes and layout:
        Any floating-point dtype (float16, bfloat16, float32, float64), which is also the result's; computed by PyTorch,
        which keeps NCHW and NHWC.  A `FeaturePyramidNetwork` folds it into the convolution before it, in float32 and
        float64.

    Cost:
        ``2 N C H W itemsize`` bytes; folded, none.

    Source:
        torchvision's class of the same name, with the same keys; `torch.nn.functional.batch_norm`.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in zip(_TENSORS, (1.0, 0.0, 0.0, 1.0), strict=True):
            self.register_buffer(name, torch.full((num_features,), value))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        # Under autograd F.batch_norm saves x for the gradients of weight and bias, which are constants here.  In
        # float32, because the scale or the shift may overflow float16 where the result does not.
        scale, shift = _affine(self)
        shape = (1, -1, 1, 1)
        return (_wide(x) * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


_FORWARDS = (torch_method(_BatchNorm, "forward"), torch_method(nn.SyncBatchNorm, "forward"))
_CHECKS = (torch_method(nn.BatchNorm2d, "_check_input_dim"), torch_method(nn.SyncBatchNorm, "_check_input_dim"))


def has_fixed_statistics(norm: nn.Module) -> bool:
    """Whether `norm` is, in its present mode, an affine map per channel that `fold` can absorb.

    True for BatchNorm in eval mode (also SyncBatchNorm) and for frozen BatchNorm: this library's, torchvision's or
    Detectron2's, recognised by name, tensors and eps, since theirs cannot be imported here.  False for a subclass with
    another forward, which may do anything, e.g. add an activation.
    """
    cls: Any = type(norm)
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        known = cls.forward in _FORWARDS and cls._check_input_dim in _CHECKS and "_check_input_dim" not in norm.__dict__
        return known and not norm.training and norm.running_mean is not None and norm.running_var is not None
    return (
        defining_class(cls).__name__ == "FrozenBatchNorm2d"
        and runs_own_forward(norm)
        and all(isinstance(getattr(norm, name, None), Tensor) for name in _TENSORS)
        and isinstance(getattr(norm, "eps", None), float)
    )


def tensors_of(norm: nn.Module) -> list[Tensor]:
    """The tensors that `fold` reads from a norm with fixed statistics."""
    return [tensor for name in _TENSORS if (tensor := getattr(norm, name)) is not None]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` with ``norm(x) = scale * x + shift`` per channel, in float32 or float64."""
    mean, variance = _wide(norm.running_mean), _wide(norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * _wide(norm.weight)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + _wide(norm.bias)
    return scale, shift


def _wide(tensor: Any) -> Tensor:
    wide: Tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide


def fold(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight and bias of one convolution equal to ``norm(conv(x))``.

    Not cached: each call sees the latest optimiser step, checkpoint or in-place edit, and gradients reach the
    parameters of the convolution and of the norm.

    Args:
        weight: ``[Cout, Cin, k, k]``, float32 or float64; in 16 bits the product may overflow.
        bias: ``[Cout]`` or None.
        norm: a norm for which `has_fixed_statistics` is true, of the same dtype.
    """
    scale, shift = _affine(norm)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    return weight * scale.view(-1, 1, 1, 1), shift
