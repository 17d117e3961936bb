"""The torch operators, one folder each; importing this package registers them."""

from fpn_kernels.operators import (
    channel_sums,
    lateral_connection,
    output_conv,
    reorder,
    top_down_pathway,
    upsample_add,
    weighted_merge,
)

__all__ = [
    "channel_sums",
    "lateral_connection",
    "output_conv",
    "reorder",
    "top_down_pathway",
    "upsample_add",
    "weighted_merge",
]
