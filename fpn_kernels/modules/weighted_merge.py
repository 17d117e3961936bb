"""The merge of a BiFPN: learned weights over two or three maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpn_kernels.functional import weighted_merge
from fpn_kernels.operators import checks


class WeightedMerge(nn.Module):
    """Merges two or three maps with learned weights.

    The parameter ``weights``, ``[num_inputs]``, starts as ones: an average.

    Args:
        num_inputs: 2 or 3.
        normalization: ``"relu"`` (fast normalized fusion) or ``"softmax"`` (softmax-based fusion).
        eps: added to the sum of the weights in ``"relu"``.
        mode: resize of a map whose size differs from the first one's, as in `fpn_kernels.upsample_add`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `num_inputs`, `normalization`, `eps` or `mode` is out of range.

    Shape:
        Maps ``[N, C, h_i, w_i]``, as a list or tuple, to ``[N, C, H, W]``, the size of the first.

    Dtypes and layout:
        As in `fpn_kernels.weighted_merge`: float16, bfloat16, float32 and float64; NHWC if the first map is, else NCHW.
        The weights may have another dtype than the maps.

    Cost:
        ``(sum_i N C h_i w_i + N C H W) itemsize`` bytes.

    Source:
        EfficientDet, arXiv 1911.09070, section 3.3.
    """

    def __init__(
        self, num_inputs: int = 2, normalization: str = "relu", eps: float = 1e-4, *, mode: str = "nearest"
    ) -> None:
        super().__init__()
        if num_inputs not in (2, 3):
            raise ValueError(f"num_inputs: expected 2 or 3, got {num_inputs!r}")
        checks.check_normalization(normalization, eps)
        checks.check_mode(mode)
        self.normalization, self.eps, self.mode = normalization, eps, mode
        self.weights = nn.Parameter(torch.ones(num_inputs))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The merged map, in the size of the first; see `fpn_kernels.weighted_merge`."""
        return weighted_merge(inputs, self.weights, normalization=self.normalization, eps=self.eps, mode=self.mode)

    def extra_repr(self) -> str:
        return f"{self.weights.shape[0]}, normalization={self.normalization!r}, eps={self.eps}, mode={self.mode!r}"
