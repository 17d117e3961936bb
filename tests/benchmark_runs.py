"""Files as a run of the benchmarks writes them, with figures that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def entry(provider: str, times: list[float], eager: list[float] | None = None, **extra: Any) -> dict[str, Any]:
    info = {
        "operator": "upsample_add",
        "direction": "forward",
        "case": "C2 b1 bf16 NHWC",
        "provider": provider,
        "dtype": "bf16",
        "bytes": 10**7,
        "flops": 10**6,
        "eager_times": eager or [],
        **extra,
    }
    return {"extra_info": info, "stats": {"data": times}}


def ceiling(name: str, source: str, amount: float, times: list[float], **extra: Any) -> dict[str, Any]:
    return {"extra_info": {"ceiling": name, "source": source, "amount": amount, **extra}, "stats": {"data": times}}


def write(path: Path, *entries: dict[str, Any], **document: Any) -> Path:
    path.write_text(json.dumps({"benchmarks": list(entries), "machine_info": {}, "datetime": "", **document}))
    return path
