"""The machine and the versions: `python -m benchmarks.machine [DEVICE]` prints them as JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# The names of `nvidia-smi --query-gpu`.
_FIELDS = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit"),
    *("temperature.gpu", "utilization.gpu", "ecc.mode.current", "mig.mode.current", "persistence_mode"),
)


def _output(*command: str) -> str:
    """The output of a command, "" if it is not installed or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True, cwd=ROOT)
        return ran.stdout.strip()
    return ""


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clock rates, power and temperature of the first GPU; None without nvidia-smi."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in text.partition("\n")[0].split(",")]
    return dict(zip(_FIELDS, values, strict=False)) if text else None


def git_commit() -> str | None:
    """The commit, with "+changes" if the tree differs from it; None outside a clone."""
    commit = _output("git", "rev-parse", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "") or None


def stalled_seconds() -> float | None:
    """Seconds since boot in which a runnable task waited for a CPU; None if the kernel does not count them."""
    try:
        text = Path("/proc/pressure/cpu").read_text()
        return int(text.splitlines()[0].rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def collect(device: str) -> dict[str, Any]:
    """The facts that a figure depends on."""
    import torch

    import fpn_kernels
    from benchmarks.clock import keep_pages
    from benchmarks.internals import tf32_is_allowed, triton_version, unavailable
    from benchmarks.providers import compiler_missing

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    gpu = None
    if on_gpu and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device)
        gpu = {"name": found.name, "capability": f"sm_{found.major}{found.minor}", "l2_bytes": found.L2_cache_size}
        gpu |= {"multiprocessors": found.multi_processor_count, "memory_bytes": found.total_memory}
    return {
        "gpu": gpu,
        "nvidia_smi": nvidia_smi() if on_gpu else None,
        "device": device,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nvcc": _output("nvcc", "--version").rpartition("\n")[2] or None,
        "fpn_kernels": fpn_kernels.__version__,
        "commit": git_commit(),
        "tf32_convolutions": tf32_is_allowed(),
        "backends": list(fpn_kernels.available_backends()),
        "not_here": unavailable(),
        "torch_compile": compiler_missing("cuda" if on_gpu else "cpu"),
        "allocator": None if on_gpu else keep_pages(),
        "forced_backend": os.environ.get("FPN_KERNELS_BACKEND"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    print(json.dumps(collect(sys.argv[1] if sys.argv[1:] else "auto")))
