"""Files as a run of the benchmarks writes them, with known figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import records

GPU = {"name": "NVIDIA H200", "capability": "sm_90", "multiprocessors": 132, "l2_bytes": 60_000_000}


def times(own: float, ratio: float | None = None, spread: float = 0.01) -> dict[str, float]:
    found = {"own": own, "spread": spread, "rounds": 8}
    return found if ratio is None else {**found, "eager": own * ratio, "ratio": ratio}


def row(provider: str, own: float, ratio: float | None = None, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    """A row of 10 MB."""
    return {
        "kind": "row",
        "operator": "upsample_add",
        "direction": "forward",
        "case": "C2 b1 bf16 NHWC",
        "level": 2,
        "batch": 1,
        "dtype": "bf16",
        "layout": "NHWC",
        "provider": provider,
        "status": "ok",
        "bytes": 10**7,
        "flops": 10**6,
        "served_by": {"upsample_add": "native"} if provider == "fpn_kernels" else {},
        "caller": times(own, ratio, spread),
        **changes,
    }


def gpu_row(provider: str = "fpn_kernels", own: float = 19e-6, ratio: float = 4.0, **changes: Any) -> dict[str, Any]:
    """A row on the device; the caller waits three times as long."""
    changes = {"case": "800x1280 C2 b1 bf16 NHWC", "device": times(own, ratio), "method": "graph", **changes}
    return row(provider, 3 * own, ratio / 2, **changes)


def not_measured(provider: str, reason: str, **changes: Any) -> dict[str, Any]:
    entry = row(provider, 1.0, **changes)
    for name in ("bytes", "flops", "caller"):
        del entry[name]
    return {**entry, "status": "not measured", "reason": reason}


def document(*rows: dict[str, Any], ceilings: tuple[tuple[str, float], ...] = (), **changes: Any) -> dict[str, Any]:
    """A complete run."""
    found = records.empty(date="2026-01-31T12:00:00")
    limits = [{"limit": limit, "source": "a test", "rate": rate} for limit, rate in ceilings]
    return {**found, "complete": True, "rows": list(rows), "ceilings": limits, **changes}


def write(path: Path, *rows: dict[str, Any], **changes: Any) -> Path:
    records.write(document(*rows, **changes), path)
    return path
