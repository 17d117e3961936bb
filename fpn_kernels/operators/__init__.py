"""The torch operators: schema, fake implementation and autograd formula, one file each."""

from fpn_kernels.operators import (
    channel_sums,
    decompositions,
    lateral_connection,
    merge_backward,
    output_conv,
    output_conv_backward_weight,
    output_conv_levels,
    reorder,
    top_down_pathway,
    upsample_add,
    upsample_add_backward,
    weighted_merge,
    weighted_merge_backward,
)

__all__ = [
    "channel_sums",
    "decompositions",
    "lateral_connection",
    "merge_backward",
    "output_conv",
    "output_conv_backward_weight",
    "output_conv_levels",
    "reorder",
    "top_down_pathway",
    "upsample_add",
    "upsample_add_backward",
    "weighted_merge",
    "weighted_merge_backward",
]
