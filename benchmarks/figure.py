"""A run as a picture: the speed of each provider against eager, case by case, and the roofline.

Needs matplotlib; `draw` raises `ImportError` without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import EAGER
from benchmarks.records import Results, Row, ratio_to_eager
from benchmarks.report import format_seconds, header

# Distinct for colour-blind readers (Okabe and Ito).
_COLOURS = {
    EAGER: "#8c8c8c",
    "torch.compile": "#e69f00",
    "torch.compile max-autotune": "#d55e00",
    "fpn_kernels": "#0072b2",
    "fpn_kernels/native": "#56b4e9",
    "fpn_kernels/triton": "#009e73",
}
_OTHER = "#cc79a7"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":", "-.")
_BAR = 0.17  # inches per bar, for a label of 7 points
_ROOFLINE = 5.5
_XLABEL = "times as fast as eager (grey line); label: ratio, median time, floor as a share of it"


def draw(results: Results, path: Path) -> None:
    """Writes the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels: dict[tuple[str, str], list[tuple[Row, float]]] = {}
    for row in results.rows:
        ratio = ratio_to_eager(row, results.rival(row, EAGER), row.clock)
        panels.setdefault(row.key[:2], []).extend([(row, ratio)] if ratio else [])
    operators, directions = (list(dict.fromkeys(key[place] for key in panels)) for place in (0, 1))
    heights = [max(_height(panels.get((name, direction), [])) for direction in directions) for name in operators]
    size = (8.5 * len(directions), sum(heights) + _ROOFLINE + 1.2)
    figure = pyplot.figure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(operators) + 1, len(directions), height_ratios=[*heights, _ROOFLINE])
    for (operator, direction), rows in panels.items():
        axis = figure.add_subplot(grid[operators.index(operator), directions.index(direction)])
        axis.set_title(f"{operator}, {direction}", fontsize=10, loc="left", fontweight="bold")
        if rows:
            _bars(axis, results, rows)
        else:
            axis.set_axis_off()
    _roofline(figure.add_subplot(grid[-1, :]), results)
    figure.suptitle("\n".join(header(results)[:4]), fontsize=9, ha="left", x=0.01)
    names = list(dict.fromkeys(row.provider for row in results.rows if row.provider != EAGER))
    swatches = [Patch(color=_COLOURS.get(name, _OTHER)) for name in names]
    figure.legend(swatches, names, loc="outside upper right", ncols=len(names) or 1, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _height(rows: list[tuple[Row, float]]) -> float:
    return 1.2 + _BAR * (len(rows) + 0.6 * len({row.case for row, _ in rows}))


def _bars(axis: Any, results: Results, rows: list[tuple[Row, float]]) -> None:
    """One bar per provider and case: the ratio to eager; the whisker is the middle half of the rounds."""
    position, ticks, longest = 0.0, [], 1.0
    for case in dict.fromkeys(row.case for row, _ in rows):
        here = [(row, ratio) for row, ratio in rows if row.case == case]
        ticks.append((position + (len(here) - 1) / 2, case))
        for row, ratio in here:
            axis.barh(position, ratio, height=0.86, color=_COLOURS.get(row.provider, _OTHER))
            low, high = row.range(row.clock) if row.ratio(row.clock) else (ratio, ratio)
            axis.plot([low, high], [position, position], color="black", lw=0.8, solid_capstyle="butt")
            floor, seconds = results.floor(row), row.median(row.clock)
            share = f"  {100 * floor / seconds:.0f}%" if floor else ""
            text = f" {ratio:.2f}x  {format_seconds(seconds)}{share}"
            # Not in the layout: hundreds of labels would take minutes.
            axis.text(max(ratio, high), position, text, fontsize=7, va="center").set_in_layout(False)
            position, longest = position + 1, max(longest, ratio, high)
        position += 0.6
    axis.set_yticks([tick for tick, _ in ticks], [case for _, case in ticks], fontsize=7.5)
    axis.set_ylim(position - 0.6, -1)
    axis.set_xlim(0, 1.35 * longest)
    axis.axvline(1, color=_COLOURS[EAGER], lw=1.2, zorder=0)
    axis.tick_params(axis="x", labelsize=7.5)
    axis.set_xlabel(_XLABEL, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _roofline(axis: Any, results: Results) -> None:
    """Operations per second over operations per minimal byte: the distance of each row from the ceilings."""
    rows = [row for row in results.rows if row.flops > 0 and row.bytes > 0]
    operators = list(dict.fromkeys(row.operator for row in rows))
    axis.set_title("roofline (hollow: with backward)", fontsize=10, loc="left", fontweight="bold")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axis.grid(alpha=0.25, which="major")
    for row in rows:
        colour, marker = _COLOURS.get(row.provider, _OTHER), _MARKERS[operators.index(row.operator) % len(_MARKERS)]
        face = colour if row.direction == "forward" else "white"
        x, y = row.flops / row.bytes, row.flops / row.median(row.clock) / 1e9
        axis.plot(x, y, marker=marker, color=colour, markerfacecolor=face, markersize=5, alpha=0.85, lw=0)
    for operator, marker in zip(operators, _MARKERS, strict=False):
        axis.plot([], [], marker=marker, color="black", lw=0, markersize=5, label=operator)
    bandwidth = results.ceiling("bandwidth")
    for dash, dtype in zip(_DASHES, dict.fromkeys(row.dtype for row in rows), strict=False):
        rate = results.ceiling(f"flops {dtype.removeprefix('amp-')}")
        if bandwidth and rate:
            intensities, ridge = [row.flops / row.bytes for row in rows], rate / bandwidth
            points = [min(intensities) / 2, ridge, 2 * max(*intensities, ridge)]
            label = f"{dtype}: {bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s"
            ceilings = [min(rate, bandwidth * x) / 1e9 for x in points]
            axis.plot(points, ceilings, dash, color="#444444", lw=1.2, label=label, zorder=0)
    axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)
