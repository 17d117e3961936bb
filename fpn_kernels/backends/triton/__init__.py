"""Triton kernels, forward and backward, for NVIDIA GPUs (sm_80 and later) and, interpreted, for CPU tensors.

    eligibility.py              why a call cannot be served; asked before anything is imported or launched
    preference.py               the calls left to others unless Triton is forced: what was measured
    geometry.py                 what a launch needs to know of its tensors: strides, reach, alignment
    launching.py                a launch put together once, and repeated for the calls that are alike
    device.py                   index arithmetic that the kernels share
    upsample_add.py             upsample_add
    upsample_add_backward.py    its adjoint, by gather; the same kernels add up the bias for merge_backward.py
    upsample_add_backward_kernels.py  its device code
    merge_backward.py           grad_top and grad_bias in one pass
    channel_sums.py             a map's sums over its pixels: grad_bias where nothing else is to be read
    lateral_connection.py       1x1 convolution, bias and merge in one tiled matrix product: tables, choice and launch
    lateral_connection_kernel.py  its device code
    weighted_merge.py           two or three maps by weights that it normalises itself
    weighted_merge_kernels.py   its device code
    weighted_merge_backward.py  what one of them and its factor are owed
    resized.py                  a tile of a map that is resized on the way
    descriptor_kernels.py       1x1 and 3x3 convolutions over tensor descriptors, persistent: the device code
    descriptor_convolution.py   their launch
    lateral_connection_descriptors.py   lateral_connection by them: a candidate, nowhere the fastest yet
    stationary_kernels.py       a 1x1 convolution for Hopper, its weight kept in shared memory: device code in Gluon
    stationary_flat_kernels.py  its twin for NCHW and for coarser maps of any size
    lateral_connection_stationary.py    lateral_connection by them: candidates that have not run on a GPU yet
    output_conv.py              3x3 convolution of one map or of a pyramid by them
    top_down_pathway.py         the lateral connections of all levels, each launched while the one before it runs
    autotune.py                 FPN_KERNELS_AUTOTUNE=1: candidates measured once and remembered on disk
    compiled.py                 every configuration of every kernel, for compilation ahead of time

Importing this package does not import Triton: a kernel's file is imported at its first launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fpn_kernels.backends import evidence
from fpn_kernels.backends.selection import Backend, Implementation
from fpn_kernels.backends.triton import eligibility, preference

# Where an operator's file has the name of another.
_FILES = {"output_conv_levels": "output_conv"}


def _at_first_launch(operator: str) -> Callable[..., Any]:
    """`prepare` of the operator, from its file."""
    kernels: list[Callable[..., Any]] = []

    def prepare(*arguments: Any) -> Any:
        if not kernels:
            file = importlib.import_module(f"{__name__}.{_FILES.get(operator, operator)}")
            kernels.append(getattr(file, operator).prepare)
        run = kernels[0](*arguments)
        if importlib.import_module(f"{__name__}.autotune").put_off():
            run.transient = True
        return run

    return prepare


_OPTIONAL = {"optional": True}

BACKEND = Backend(
    name="triton",
    unavailable=eligibility.unavailable,
    implementations={
        operator: Implementation(
            _at_first_launch(operator),
            getattr(eligibility, operator),
            only_forced=getattr(preference, operator, preference.memory_bound),
            evidence=evidence.of("triton", operator),
            **others,
        )
        for operator, others in (
            ("upsample_add", {}),
            ("upsample_add_backward", {}),
            ("lateral_connection", {}),
            ("merge_backward", {}),
            ("channel_sums", _OPTIONAL),
            ("weighted_merge", {}),
            ("weighted_merge_backward", {}),
            ("output_conv", {"fastest_format": preference.output_conv_format, **_OPTIONAL}),
            ("output_conv_levels", _OPTIONAL),
            ("top_down_pathway", _OPTIONAL),
        )
    },
)
