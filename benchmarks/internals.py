"""Everything that the benchmarks import from the library's internals, so that a move of those changes this file."""

from __future__ import annotations

from fpn_kernels.compatibility import tf32_is_allowed as tf32_is_allowed
from fpn_kernels.functional import output_conv_levels as output_conv_levels
from fpn_kernels.gpu import availability, geometry
from fpn_kernels.gpu.availability import INTERPRETED as INTERPRETED
from fpn_kernels.operators import dispatch, plan_cache
from fpn_kernels.operators.dispatch import BackendUnavailableError as BackendUnavailableError
from fpn_kernels.operators.dispatch import record_calls as record_calls

__all__ = ["availability", "dispatch", "geometry", "plan_cache"]


def unavailable() -> dict[str, str]:
    """Backend to the reason why this machine does not have it."""
    reasons = {name: why() for name, why in dispatch.BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
