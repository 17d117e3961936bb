"""The calls of `upsample_add` and of its backward operators: arguments, checks and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fpn_kernels.operators.checks import check_alike, check_map, check_mode, shape_of
from fpn_kernels.operators.layouts import allocate, result_format


class UpsampleAdd(NamedTuple):
    """``gain * (lateral + resize(top, lateral's size))``."""

    top: Tensor
    lateral: Tensor
    mode: str = "nearest"
    gain: float = 1.0

    def check(self) -> None:
        top, lateral = self.top, self.lateral
        check_mode(self.mode)
        check_map("top", top)
        check_map("lateral", lateral)
        check_alike("top", top, "lateral", lateral)
        if top.shape[0] != lateral.shape[0] or top.shape[1] != lateral.shape[1]:
            raise ValueError(
                f"top: expected the batch and channels of lateral, [{lateral.shape[0]}, {lateral.shape[1]}, h, w], "
                f"got {shape_of(top)}"
            )

    def allocate(self) -> Tensor:
        return allocate(self.lateral.shape, self.lateral, result_format(self.lateral))

    def empty(self) -> Tensor | None:
        return self.allocate() if self.lateral.numel() == 0 else None

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: one pass where PyTorch takes two"


class UpsampleAddBackward(NamedTuple):
    """The gradient of `top`: ``gain * adjoint_of_resize(grad)``."""

    grad: Tensor
    top_size: Sequence[int]
    mode: str = "nearest"
    gain: float = 1.0

    def check(self) -> None:
        check_mode(self.mode)
        check_map("grad", self.grad)
        top_size = self.top_size
        if len(top_size) != 2 or top_size[0] < 1 or top_size[1] < 1:
            raise ValueError(f"top_size: expected two sizes of at least 1, got {list(top_size)}")

    def shape(self) -> tuple[int, ...]:
        """The shape of the gradient of `top`."""
        return (*self.grad.shape[:2], *self.top_size)

    def allocate(self) -> Tensor:
        return allocate(self.shape(), self.grad, result_format(self.grad))

    def empty(self) -> Tensor | None:
        return self.allocate() if self.grad.numel() == 0 else None

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: the gradient is read once, also at ratios where PyTorch's own is not exact"


class MergeBackward(NamedTuple):
    """The gradients of `top` and of the bias below a merge, in one pass over `grad`.

    ``grad_top = upstream + gain * adjoint_of_resize(grad)`` and ``grad_bias[c] = gain * sum of grad[:, c]``.
    `upstream` is another part of the gradient of `top`, in a pyramid the one from its output convolution; None is zero.
    """

    grad: Tensor
    top_size: Sequence[int]
    upstream: Tensor | None
    mode: str = "nearest"
    gain: float = 1.0

    def check(self) -> None:
        self.adjoint().check()
        upstream = self.upstream
        if upstream is None:
            return
        check_map("upstream", upstream)
        check_alike("upstream", upstream, "grad", self.grad)
        expected = [*self.grad.shape[:2], *self.top_size]
        if list(upstream.shape) != expected:
            raise ValueError(f"upstream: expected the shape {expected}, got {shape_of(upstream)}")

    def adjoint(self) -> UpsampleAddBackward:
        """The call for the gradient of `top` alone."""
        return UpsampleAddBackward(self.grad, self.top_size, self.mode, self.gain)

    def allocate(self) -> tuple[Tensor, Tensor]:
        return self.adjoint().allocate(), self.grad.new_empty(self.grad.shape[1])

    def empty(self) -> tuple[Tensor, Tensor] | None:
        if self.grad.numel() > 0:
            return None
        grad_top, grad_bias = self.allocate()
        return grad_top, grad_bias.zero_()

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: the gradient is read once for top and bias, where PyTorch reads it twice"
