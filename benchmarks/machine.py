"""Facts of the machine that every kind of run records."""

from __future__ import annotations

import torch


def capability(device: torch.device) -> str:
    """The GPU's compute capability, or the CPU instructions that PyTorch uses."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


def triton_version() -> str | None:
    """None where Triton is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
