"""The call of `channel_sums`: argument, check and result."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fpn_kernels.operators.checks import check_map


class ChannelSums(NamedTuple):
    """The sum of each channel over all pixels: the gradient of a convolution's bias."""

    source: Tensor

    def check(self) -> None:
        check_map("source", self.source)

    def allocate(self) -> Tensor:
        return self.source.new_empty(self.source.shape[1])

    def empty(self) -> Tensor | None:
        return self.allocate().zero_() if self.source.numel() == 0 else None

    def argument(self) -> str:
        """Why a kernel is expected to beat eager PyTorch, for calls without a measurement."""
        return "by bytes: one read, with the partial sums that merge_backward was measured with"
