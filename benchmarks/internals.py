"""Everything that the benchmarks import from the library's internals, so that a move of those changes this file."""

from __future__ import annotations

from fpn_kernels.backends import selection, serving
from fpn_kernels.backends.convolution import tf32_is_allowed as tf32_is_allowed
from fpn_kernels.backends.selection import BackendUnavailableError as BackendUnavailableError
from fpn_kernels.backends.selection import record_calls as record_calls
from fpn_kernels.backends.triton import eligibility, geometry
from fpn_kernels.backends.triton.eligibility import INTERPRETED as INTERPRETED
from fpn_kernels.functional import output_conv_levels as output_conv_levels

__all__ = ["eligibility", "geometry", "selection", "serving"]


def unavailable() -> dict[str, str]:
    """Backend to the reason why this machine does not have it."""
    reasons = {backend.name: backend.unavailable() for backend in selection.backends()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
