"""What a run wrote: the rows, the ceilings and the machine, read from pytest-benchmark's JSON.

Needs neither torch nor the library, so that a file can be read anywhere.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EAGER = "eager"
# A row whose middle half of rounds spreads over more than this fraction of its median is marked as unsteady.
_UNSTEADY = 0.2


class ReportError(Exception):
    """The file cannot be reported on; the message says why, for the user."""


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    Attributes:
        times: clock ("caller": until the result is there; "device": on the GPU itself) to the seconds of each round.
        eager_times: the same for the rounds of eager that alternated with them; empty in eager's own row.
        served_by: the backends behind the library's row.
    """

    operator: str
    direction: str
    case: str
    provider: str
    dtype: str
    bytes: int
    flops: int
    times: Mapping[str, Sequence[float]]
    eager_times: Mapping[str, Sequence[float]]
    served_by: str

    def median(self, clock: str) -> float:
        return statistics.median(self.times[clock])

    def ratios(self, clock: str) -> list[float]:
        """Eager's time over this row's, pair by pair."""
        return [eager / own for eager, own in zip(self.eager_times[clock], self.times[clock], strict=False)]

    def unsteady(self, clock: str) -> bool:
        """Whether what is shown of this row (the ratio; in eager's, the time) spreads too much to be trusted."""
        values = self.ratios(clock) or self.times[clock]
        first, third = middle_half(values)
        return third - first > _UNSTEADY * statistics.median(values)

    @property
    def clock(self) -> str:
        """The device's own where it was taken, else the caller's."""
        return "device" if "device" in self.times else "caller"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What is the same of this row in another run."""
        return self.operator, self.direction, self.case, self.provider


@dataclass
class Results:
    """A run: its rows in the order in which they ran, its ceilings, and the machine.

    `ceilings` maps what is limited ("bandwidth", "flops bf16") and by which measurement ("copy") to the best rate
    seen a second.
    """

    rows: list[Row] = field(default_factory=list)
    ceilings: dict[tuple[str, str], float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    def floor(self, row: Row) -> float | None:
        """Seconds that the row's minimal bytes and operations take at the measured ceilings."""
        bandwidth, rate = self.ceiling("bandwidth"), self.ceiling(f"flops {row.dtype}")
        if not bandwidth or not rate:
            return None
        return max(row.bytes / bandwidth, row.flops / rate)

    def ceiling(self, name: str) -> float | None:
        """The best rate that any measurement of this limit saw."""
        return max((rate for (limit, _), rate in self.ceilings.items() if limit == name), default=None)


def load(path: Path) -> Results:
    """Reads a file of pytest-benchmark's; `ReportError` where it is missing, empty or not from this suite."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise ReportError(f"{path} is empty: the run that should have written it did not finish")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    entries = document.get("benchmarks") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ReportError(f"{path} is not a file of pytest-benchmark's: it has no list of benchmarks")
    results = Results(
        machine=(document.get("machine_info") or {}).get("fpn_kernels") or {}, date=document.get("datetime") or ""
    )
    for entry in entries:
        _read(entry, results)
    if not results.rows and not results.ceilings:
        raise ReportError(f"{path} holds {len(entries)} benchmarks, none of them from this suite")
    return results


def _read(entry: Mapping[str, Any], results: Results) -> None:
    info, times = entry.get("extra_info") or {}, (entry.get("stats") or {}).get("data")
    if not times:
        return
    if "ceiling" in info:
        key = (info["ceiling"], info["source"])
        rate = info["amount"] / min(info.get("device_times") or times)
        results.ceilings[key] = max(rate, results.ceilings.get(key, 0.0))
    if "provider" not in info:
        return
    clocks = {"caller": ("eager_times", times)}
    if info.get("device_times"):
        clocks["device"] = ("eager_device_times", info["device_times"])
    served = (info.get("served_by") or {}).values()
    results.rows.append(
        Row(
            **{name: info[name] for name in ("operator", "direction", "case", "provider", "dtype", "bytes", "flops")},
            times={clock: own for clock, (_, own) in clocks.items()},
            eager_times={clock: info.get(eager) or [] for clock, (eager, _) in clocks.items()},
            served_by="+".join(dict.fromkeys(name for names in served for name in names.split("+"))),
        )
    )


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def ratio_to_eager(row: Row | None, eager: Row | None, clock: str) -> float | None:
    """The median over pairs; in a file without pairs, eager's median over the row's; None without either."""
    if row is None:
        return None
    if pairs := row.ratios(clock):
        return statistics.median(pairs)
    return eager.median(clock) / row.median(clock) if eager else None
