"""The machine and the versions: `python -m benchmarks.gpu.environment` prints them as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# As `nvidia-smi --query-gpu` names them.
_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "ecc.mode.current",
    "mig.mode.current",
    "persistence_mode",
)


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is not here or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clock rates, power and temperature at this moment, of the first GPU; None without nvidia-smi."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", "--id=0")
    if not text:
        return None
    values = [value.strip() for value in text.splitlines()[0].split(",")]
    return dict(zip(_FIELDS, values, strict=False))


def git_commit() -> str | None:
    """The commit, with "+changes" where the tree differs from it; None where this is no clone."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _gpu(torch: Any) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def collect(device_type: str) -> dict[str, Any]:
    """Everything that a figure depends on; "providers" are the columns that this machine can have."""
    import torch

    import fpn_kernels
    from benchmarks import machine, providers
    from benchmarks.cases import COMPILE
    from fpn_kernels.backends import convolution, selection

    available = fpn_kernels.available_backends()
    names = [provider.name for provider in providers.providers(device_type, "quick", available, compiled=True)]
    why_not = providers.compiler_missing(device_type)
    if why_not:
        names = [name for name in names if name != COMPILE]
    nvcc = _output("nvcc", "--version")
    return {
        "gpu": _gpu(torch),
        "nvidia_smi": nvidia_smi(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "compute_sanitizer": shutil.which("compute-sanitizer") is not None,
        "fpn_kernels": fpn_kernels.__version__,
        "commit": git_commit(),
        "tf32_convolutions": convolution.tf32_is_allowed(),
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
        "backends": list(available),
        "not_here": {b.name: why for b in selection.backends() if (why := b.unavailable()) is not None},
        "torch_compile": why_not or "works as far as can be seen",
        "providers": names,
        "measured_backends": [name for name in available if name != "eager" and providers.serves(name, device_type)],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.environment")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    print(json.dumps(collect(parser.parse_args().device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
