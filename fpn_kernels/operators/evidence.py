"""Why a backend serves a call: a run in benchmarks/results, or an argument where no run has such a call.

A figure is the lowest and the highest ratio to eager over the rows of a run that an operator served, on the device.
A backward operator is timed with its forward.  `tests/ops/test_evidence.py` reads the same figures from the runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_kernels import native

Range = tuple[float, float]
_HALVES = (torch.float16, torch.bfloat16)

GPU_RUN = "an H100, bfloat16, 800 x 1280, 2026-11-27"
GPU_CAPABILITY = (9, 0)
# (backend, operator) -> layout -> range.  The NCHW lateral connection changed after that run.
GPU: dict[tuple[str, str], dict[str, Range]] = {
    ("native", "upsample_add"): {"NHWC": (4.66, 5.24), "NCHW": (2.94, 3.04)},
    ("native", "upsample_add_backward"): {"NHWC": (4.58, 4.83), "NCHW": (3.01, 3.01)},
    ("triton", "upsample_add"): {"NHWC": (4.58, 4.95)},
    ("triton", "upsample_add_backward"): {"NHWC": (4.51, 4.51)},
    ("triton", "lateral_connection"): {"NHWC": (3.81, 6.09), "NCHW": (1.13, 1.19)},
    ("triton", "product"): {"NHWC": (2.98, 3.20), "NCHW": (1.15, 1.15)},
    ("triton", "merge_backward"): {"NHWC": (2.98, 3.20), "NCHW": (1.15, 1.15)},
    ("triton", "weighted_merge"): {"NHWC": (3.62, 7.13), "NCHW": (2.85, 2.85)},
    ("triton", "weighted_merge_backward"): {"NHWC": (2.91, 4.71)},
    ("triton", "output_conv"): {"NHWC": (1.40, 1.46)},
    ("triton", "output_conv_levels"): {"NHWC": (1.35, 1.39)},
    ("triton", "top_down_pathway"): {"NHWC": (4.62, 5.30), "NCHW": (1.22, 1.22)},
}

CPU_RUNS = {
    "AVX512": "a Xeon with AMX, float32, 2026-11-21",
    "AMX": "a Xeon with AMX, bfloat16, 2026-11-21",
    "AVX2": "an EPYC with AVX2, float32, 2026-11-28",
}
# Operator -> run -> range.
CPU: dict[str, dict[str, Range]] = {
    "upsample_add": {"AVX512": (1.90, 3.16), "AMX": (2.01, 3.28), "AVX2": (1.82, 3.31)},
    "upsample_add_backward": {"AVX512": (2.40, 2.83), "AMX": (2.61, 3.28), "AVX2": (2.05, 2.67)},
    "lateral_connection": {"AVX512": (1.02, 1.47), "AMX": (1.28, 6.06), "AVX2": (1.00, 1.12)},
    "product": {"AVX512": (1.09, 1.13), "AMX": (1.18, 3.98), "AVX2": (1.03, 1.17)},
    "merge_backward": {"AVX512": (1.09, 1.13), "AMX": (1.18, 3.98), "AVX2": (1.03, 1.17)},
    "weighted_merge": {"AVX512": (1.20, 3.54), "AMX": (1.12, 4.35), "AVX2": (1.50, 4.90)},
    "weighted_merge_backward": {"AVX512": (1.11, 1.73), "AMX": (1.10, 1.55), "AVX2": (1.05, 1.81)},
    "output_conv": {"AVX512": (1.37, 1.48), "AMX": (1.06, 2.29), "AVX2": (1.36, 1.69)},
    "output_conv_backward_weight": {"AVX512": (1.14, 1.14), "AMX": (1.39, 1.49), "AVX2": (1.65, 2.33)},
}

# Operators without rows of their own name: operator and direction of their rows.
ROWS = {
    "upsample_add_backward": ("upsample_add", "forward+backward"),
    "product": ("lateral_connection", "forward+backward"),
    "merge_backward": ("lateral_connection", "forward+backward"),
    "weighted_merge_backward": ("weighted_merge", "forward+backward"),
    "output_conv_levels": ("output_conv", "forward"),
    "output_conv_backward_weight": ("output_conv", "forward+backward"),
}


def of(backend: str, operator: str, call: Any) -> str:
    """The measurement or the argument for which a backend serves a call, in one line."""
    first = call[0] if isinstance(call[0], Tensor) else call[0][0]
    # Without bias and top nothing is merged: the gradient of a feature is such a call.
    alone = operator == "lateral_connection" and call.bias is None and call.top is None
    name, mode = "product" if alone else operator, getattr(call, "mode", None)
    measured = _on_gpu(backend, name, first, mode) if first.device.type == "cuda" else _on_cpu(name, first, mode)
    if measured is not None:
        return measured
    return f"argued {call.argument()}; not measured for {_kind(first, mode)}"


def _on_gpu(backend: str, name: str, tensor: Tensor, mode: str | None) -> str | None:
    layout = _layout(tensor)
    figures = GPU.get((backend, name), {}).get(layout)
    here = (
        torch.cuda.get_device_capability(tensor.device)[0] == GPU_CAPABILITY[0]
        and mode in (None, "nearest")
        and tensor.dtype in _HALVES
    )
    if not here or figures is None:
        return None
    also = "; float16 has the same sizes and rates" if tensor.dtype == torch.float16 else ""
    return _measured(GPU_RUN, name, figures) + f" in {layout}{also}"


def _on_cpu(name: str, tensor: Tensor, mode: str | None) -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    run = capability if tensor.dtype == torch.float32 else None
    if native.multiplies_by_tiles(tensor.dtype):
        run = "AMX"
    figures = CPU.get(name, {}).get(run or "")
    if run is None or figures is None or mode not in (None, "nearest"):
        return None
    return _measured(CPU_RUNS[run], name, figures)


def _layout(tensor: Tensor) -> str:
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return "NHWC"
    return "NCHW" if tensor.is_contiguous() else "other strides"


def _measured(run: str, name: str, figures: Range) -> str:
    low, high = (f"{ratio:.2f}x" for ratio in figures)
    with_forward = "forward and backward " if ROWS.get(name, ("", ""))[1] == "forward+backward" else ""
    return f"measured on {run}: {with_forward}{low if low == high else f'{low} to {high}'} eager"


def _kind(tensor: Tensor, mode: str | None) -> str:
    kind = str(tensor.dtype).removeprefix("torch.") + (f", {mode}" if mode else "")
    if tensor.device.type != "cuda":
        return f"{kind} on {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"{kind} in {_layout(tensor)} on compute capability {major}.{minor}"
