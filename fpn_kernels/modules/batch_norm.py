"""BatchNorm with fixed statistics: the module, and its folding into the convolution before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn_kernels.modules.alterations import defining_class, runs_own_forward, torch_method


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine parameters are constants (buffers), as detectors use it.

    The ``num_batches_tracked`` of an `nn.BatchNorm2d` checkpoint is dropped on loading.

    Args:
        num_features: channels C of the input.
        eps: added to the variance.

    Shape:
        ``[N, C, H, W]`` to the same.

    Raises:
        RuntimeError: the input has another number of channels (PyTorch's own message).

    Dtypes and layout:
        Any floating-point dtype, which the result has, too (float16, bfloat16, float32, float64); computed by PyTorch,
        which keeps NCHW and NHWC.  In a `FeaturePyramidNetwork` it is folded into the convolution before it, in float32
        and float64.

    Cost:
        ``2 N C H W itemsize`` bytes; folded, none.

    Source:
        torchvision's class of the same name, in keys and meaning; `torch.nn.functional.batch_norm`.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

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
        # With gradients F.batch_norm would keep x for the gradient of weight and bias, which nobody asks for.
        # In float32, for what the scale or the shift overflows float16 the result may not.
        scale, shift = _affine(self)
        shape = (1, -1, 1, 1)
        return (_wide(x) * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


_FORWARDS = (torch_method(_BatchNorm, "forward"), torch_method(nn.SyncBatchNorm, "forward"))
_CHECKS = (torch_method(nn.BatchNorm2d, "_check_input_dim"), torch_method(nn.SyncBatchNorm, "_check_input_dim"))


def has_fixed_statistics(norm: nn.Module) -> bool:
    """Whether `norm` is, in its present mode, the affine map of a channel that `fold` can absorb.

    True for BatchNorm in eval mode (SyncBatchNorm included) and for frozen BatchNorm: this library's,
    torchvision's or Detectron2's, told by its name, its tensors and its eps, since theirs cannot be imported
    here.  A subclass with a forward of its own might do anything (an activation, say) and is not folded.
    """
    cls: Any = type(norm)
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        known = cls.forward in _FORWARDS and cls._check_input_dim in _CHECKS and "_check_input_dim" not in norm.__dict__
        return known and not norm.training and norm.running_mean is not None and norm.running_var is not None
    return (
        defining_class(cls).__name__ == "FrozenBatchNorm2d"
        and runs_own_forward(norm)
        and all(
            isinstance(getattr(norm, name, None), Tensor) for name in ("weight", "bias", "running_mean", "running_var")
        )
        and isinstance(getattr(norm, "eps", None), float)
    )


def tensors_of(norm: nn.Module) -> list[Tensor]:
    """What `fold` reads of a norm that `has_fixed_statistics`."""
    found = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return [tensor for tensor in found if tensor is not None]  # type: ignore[misc]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` with ``norm(x) = scale * x + shift`` for each channel; in float32 at least."""
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
    """The weight and bias of one convolution equal to ``norm(conv(x))``, made anew at every call.

    Nothing is cached, so an optimiser step, a loaded checkpoint or an in-place edit can never be missed, and
    gradients reach the convolution's parameters and the affine parameters of the norm.

    Args:
        weight: ``[Cout, Cin, k, k]``, float32 or float64: in 16 bits what is folded may overflow.
        bias: ``[Cout]`` or None.
        norm: a norm that `has_fixed_statistics`, of the same dtype.
    """
    scale, shift = _affine(norm)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    return weight * scale.view(-1, 1, 1, 1), shift
