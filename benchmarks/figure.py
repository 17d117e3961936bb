"""A run as a picture: how fast each provider is beside eager, case by case, and where each lies under the roofline.

Needs matplotlib; `draw` raises `ImportError` without it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import EAGER, Results, Row, middle_half, ratio_to_eager
from benchmarks.tables import format_seconds, header

# Told apart by those who do not see colours alike (Okabe and Ito); the library's own in one family.
_COLOURS = {
    EAGER: "#8c8c8c",
    "torch.compile": "#e69f00",
    "torch.compile max-autotune": "#d55e00",
    "fpn_kernels": "#0072b2",
    "fpn_kernels/native": "#56b4e9",
    "fpn_kernels/triton": "#009e73",
    "fpn_kernels/eager": "#b8a9c9",
}
_OTHERS = ("#cc79a7", "#999933", "#882255")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":", "-.")
_BAR = 0.17  # inches of a bar's height: its label is of 7 points


def draw(results: Results, path: Path) -> None:
    """Writes the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    groups = list(dict.fromkeys((row.operator, row.direction) for row in results.rows))
    operators = list(dict.fromkeys(operator for operator, _ in groups))
    directions = list(dict.fromkeys(direction for _, direction in groups))
    colours = _colours(results.rows)
    heights = [
        max(_height(results, operator, direction) for direction in directions) for operator in operators
    ]  # of a row of panels
    roofline = 5.5
    total = sum(heights) + roofline + 1.2
    figure = pyplot.figure(figsize=(8.5 * len(directions), total), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(operators) + 1, len(directions), height_ratios=[*heights, roofline])
    for line, operator in enumerate(operators):
        for column, direction in enumerate(directions):
            if (operator, direction) in groups:
                _bars(figure.add_subplot(grid[line, column]), results, operator, direction, colours)
    _roofline(figure.add_subplot(grid[-1, :]), results, colours)
    figure.suptitle("\n".join(header(results)[:4]), fontsize=9, ha="left", x=0.01)
    names = [name for name in colours if any(row.provider == name != EAGER for row in results.rows)]
    swatches = [Patch(color=colours[name]) for name in names]
    figure.legend(swatches, names, loc="outside upper right", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(row.provider for row in rows))
    others = [name for name in names if name not in _COLOURS]
    return {**_COLOURS, **{name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}}


def _compared(results: Results, operator: str, direction: str) -> list[tuple[Row, float]]:
    """The rows of a panel that have a ratio to eager, and the ratio."""
    rows = [row for row in results.rows if (row.operator, row.direction) == (operator, direction)]
    eager = {row.case: row for row in rows if row.provider == EAGER}
    pairs = [(row, ratio_to_eager(row, eager.get(row.case), row.clock)) for row in rows if row.provider != EAGER]
    return [(row, ratio) for row, ratio in pairs if ratio]


def _height(results: Results, operator: str, direction: str) -> float:
    rows = _compared(results, operator, direction)
    return 1.2 + _BAR * (len(rows) + 0.6 * len({row.case for row, _ in rows}))


def _bars(axis: Any, results: Results, operator: str, direction: str, colours: dict[str, str]) -> None:
    """A bar is a provider on a case, as long as it is fast beside eager; the whisker is the middle half of rounds."""
    rows = _compared(results, operator, direction)
    clock = " (time on the device)" if any(row.clock == "device" for row, _ in rows) else ""
    axis.set_title(f"{operator}, {direction}{clock}", fontsize=10, loc="left", fontweight="bold")
    if not rows:
        axis.text(0.5, 0.5, "nothing to compare with eager", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    position, ticks = 0.0, []
    longest = max(max(ratio, *row.ratios(row.clock)) for row, ratio in rows)
    for case in dict.fromkeys(row.case for row, _ in rows):
        here = [(row, ratio) for row, ratio in rows if row.case == case]
        ticks.append((position + (len(here) - 1) / 2, case))
        for row, ratio in here:
            axis.barh(position, ratio, height=0.86, color=colours[row.provider])
            low, high = middle_half(row.ratios(row.clock) or [ratio])
            axis.plot([low, high], [position, position], color="black", lw=0.8, solid_capstyle="butt")
            floor, seconds = results.floor(row), row.median(row.clock)
            share = f"  {100 * floor / seconds:.0f}%" if floor else ""
            text = f" {ratio:.2f}x  {format_seconds(seconds)}{share}"
            # Out of the layout: hundreds of labels would take it minutes.
            axis.text(max(ratio, high), position, text, fontsize=7, va="center").set_in_layout(False)
            position += 1
        position += 0.6
    axis.set_yticks([tick for tick, _ in ticks], [case for _, case in ticks], fontsize=7.5)
    axis.set_ylim(position - 0.6, -1)
    axis.set_xlim(0, 1.35 * max(1.0, longest))
    axis.axvline(1, color=colours[EAGER], lw=1.2, zorder=0)
    axis.tick_params(axis="x", labelsize=7.5)
    axis.set_xlabel(
        "times as fast as eager (grey line); label: that, the median time, the floor's share of it", fontsize=8
    )
    axis.spines[["top", "right"]].set_visible(False)


def _roofline(axis: Any, results: Results, colours: dict[str, str]) -> None:
    """Operations a second over operations a byte, of the least bytes: how far each row is from the ceilings."""
    rows = [row for row in results.rows if row.flops > 0 and row.bytes > 0]
    axis.set_title("roofline", fontsize=10, loc="left", fontweight="bold")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations a byte (of the least bytes that the case can move)", fontsize=8)
    axis.set_ylabel("GFLOP/s", fontsize=8)
    axis.tick_params(labelsize=7.5)
    axis.grid(alpha=0.25, which="major")
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(dict.fromkeys(row.operator for row in rows))}
    labelled: set[str] = set()
    for row in rows:
        rate = row.flops / statistics.median(row.times[row.clock]) / 1e9
        colour, hollow = colours[row.provider], row.direction != "forward"
        label = None if row.provider in labelled else row.provider
        labelled.add(row.provider)
        axis.plot(
            row.flops / row.bytes,
            rate,
            marker=markers[row.operator],
            color=colour,
            markerfacecolor="white" if hollow else colour,
            markersize=5,
            alpha=0.85,
            lw=0,
            label=label,
        )
    for operator, marker in markers.items():
        axis.plot([], [], marker=marker, color="black", lw=0, markersize=5, label=operator)
    if any(row.direction != "forward" for row in rows):
        axis.plot([], [], "o", color="black", markerfacecolor="white", markersize=5, label="hollow: with backward")
    _ceilings(axis, results, rows)
    axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)


def _ceilings(axis: Any, results: Results, rows: Sequence[Row]) -> None:
    bandwidth = results.ceiling("bandwidth")
    if not rows or not bandwidth:
        return
    intensities = [row.flops / row.bytes for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    for dash, dtype in zip(_DASHES, dict.fromkeys(row.dtype for row in rows), strict=False):
        rate = results.ceiling(f"flops {dtype}")
        if not rate:
            continue
        ridge = rate / bandwidth
        right = max(high, 2 * ridge)
        points = [low, ridge, right]
        heights = [min(rate, bandwidth * x) / 1e9 for x in points]
        label = f"{dtype}: {bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s"
        axis.plot(points, heights, dash, color="#444444", lw=1.2, label=label, zorder=0)
