"""The candidates of the library's own kernels, each timed by itself, as FPN_KERNELS_AUTOTUNE=1 times them.

What the library takes unasked follows from tables and thresholds; here is what they are set by.
"""

from __future__ import annotations

from typing import Any

import torch

import fpn_kernels
from benchmarks.gpu.rows import Unit, case_of
from benchmarks.gpu.workloads import each_level, workload
from benchmarks.providers import NotMeasuredError


def measure(unit: Unit, device: torch.device) -> dict[str, Any]:
    """Runs a case once, forced to Triton, and each of its levels alone; returns what was measured on the way.

    Raises:
        NotMeasuredError: nothing is measured here, or nothing was left to measure.
    """
    if device.type != "cuda":
        raise NotMeasuredError("candidates are timed on a GPU alone")
    from fpn_kernels.backends.triton import autotune

    if not autotune.ENABLED:
        raise NotMeasuredError(f"{autotune.ENVIRONMENT_VARIABLE} is not set for this worker")
    case, before = case_of(unit), len(autotune.measurements)
    with fpn_kernels.use_backend("triton"), torch.no_grad():
        for part in dict.fromkeys((case, *each_level(case))):
            work = workload(part, device)
            work.fused.call(*work.inputs)
    torch.cuda.synchronize(device)
    made = autotune.measurements[before:]
    if not made:
        raise NotMeasuredError("one candidate alone, or all of this class measured before")
    return {
        "measured": [
            {
                "call": f"{each.operator} {each.call}",
                "default": each.default,
                "microseconds": {name: round(1e3 * time, 2) for name, time in each.milliseconds.items()},
            }
            for each in made
        ]
    }
