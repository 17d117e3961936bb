"""The torch operators: schema, fake implementation and autograd formula, one file each."""

from fpn_kernels.operators import (
    lateral_connection,
    merge_backward,
    output_conv,
    reorder,
    upsample_add,
    upsample_add_backward,
)

__all__ = ["lateral_connection", "merge_backward", "output_conv", "reorder", "upsample_add", "upsample_add_backward"]
