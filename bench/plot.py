"""The rows of a run as pictures; `python -m bench plot FILE` draws those of an earlier run.

One with a column per case: over the sizes, where there are several, time and percent of the copy,
and at the largest a bar per rival for time and for memory. One small enough for a README: the bars
of the dense case.
"""

import argparse
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report import Report, Row, number, read
from bench.rivals import FUSED

STYLES = {
    "eager_classic": ("#8c8c8c", "v"),
    "eager_composition": ("#c58b2a", "s"),
    "eager_index": ("#8b5a2b", "X"),
    "compile": ("#5b8fd6", "^"),
    "compile_grad_and_value": ("#7a4fb5", "D"),
    "flag_gems": ("#c0504d", "P"),
    FUSED: ("#0b7a3b", "o"),  # the last one, and so drawn on top
}
FLOOR = "floor: bytes / copy bandwidth\n(reads alone, or a cache, can beat it)"
FLOOR_STYLE: dict[str, Any] = {"color": "black", "linestyle": (0, (2, 2)), "linewidth": 1.0}
COLUMN_INCHES, ROW_INCHES = 3.3, 3.1


def main(arguments: Sequence[str]) -> int:
    """Draw the pictures of a report that was written before."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.add_argument("report", type=Path, nargs="+", help="JSON of `python -m bench`")
    for path in parser.parse_args(arguments).report:
        write_plots(read(path), path)
    return 0


def write_plots(report: Report, path: Path) -> None:
    """Draw both pictures beside the report's file, of what there is to draw."""
    groups = [
        (f"{case}\n{dtype}", sorted(timed, key=lambda row: row.numel))
        for (case, dtype), rows in report.groups()
        if (timed := [row for row in rows if row.median_ms is not None])
    ]
    if groups:
        has_sizes = [len({row.numel for row in rows}) > 1 for _, rows in groups]
        panels = (*OVER_SIZES, *AT_LARGEST) if any(has_sizes) else AT_LARGEST
        size = (max(COLUMN_INCHES * len(groups), 9.0), len(panels) * ROW_INCHES + 1.1)
        figure, grid = plt.subplots(len(panels), len(groups), figsize=size, squeeze=False)
        for line, (label, panel) in zip(grid, panels, strict=True):
            drawn = []
            for axes, (_, rows), several in zip(line, groups, has_sizes, strict=True):
                if several or (label, panel) in AT_LARGEST:
                    panel(axes, rows, report)
                    drawn.append(axes)
                else:
                    axes.remove()  # A line over one size would be a dot.
            drawn[0].set_ylabel(label)
        for column, (title, _) in zip(grid.T, groups, strict=True):
            highest = next(axes for axes in column if axes in figure.axes)
            highest.set_title(title, fontsize=10, fontweight="bold")
        machine = ", ".join(str(report.machine).splitlines()) + report.load
        title = f"Smooth L1: {machine}, copy {report.copy_gbps:.1f} GB/s read + written"
        _save(figure, title, report.rows, path.with_suffix(".png"))
    for title, rows in groups:
        case, dtype = title.splitlines()
        if case == "dense":
            figure, pair = plt.subplots(1, 2, figsize=(9.0, ROW_INCHES))
            for axes, (label, panel) in zip(pair, AT_LARGEST, strict=True):
                axes.set_title(label, fontsize=10)
                panel(axes, rows, report)
            title = (
                f"{dtype}, both weights, forward + backward: {report.machine.device}{report.load}"
            )
            _save(figure, title, rows, path.with_name(f"{path.stem}-summary.png"))
            break


def _save(figure: Figure, title: str, rows: Sequence[Row], path: Path) -> None:
    """Write the picture of these rows, with a legend of their rivals."""
    figure.suptitle(title, fontsize=11)
    names = {row.rival for row in rows}
    entries = [
        Line2D([], [], color=color, marker=marker, label=name)
        for name, (color, marker) in STYLES.items()
        if name in names
    ]
    entries.append(Line2D([], [], label=FLOOR, **FLOOR_STYLE))
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _times(axes: Axes, rows: list[Row], report: Report) -> None:
    _lines(axes, rows, "median_ms")
    for rival, (color, _) in STYLES.items():
        series = [row for row in rows if row.rival == rival]
        edges = [_values(series, name) for name in ("p20_ms", "p80_ms")]
        sizes = [row.numel for row in series]
        axes.fill_between(sizes, edges[0], edges[1], color=color, alpha=0.15, linewidth=0)
    floors = sorted({(row.numel, _floor_ms(row, report)) for row in rows})
    axes.plot(*zip(*floors, strict=True), **FLOOR_STYLE)
    axes.set_yscale("log")


def _percents(axes: Axes, rows: list[Row], report: Report) -> None:
    _lines(axes, rows, "percent_of_copy")
    axes.axhline(100.0, **FLOOR_STYLE)
    axes.set_ylim(0, None)


def _time_bars(axes: Axes, rows: list[Row], report: Report) -> None:
    largest = _bars(axes, rows, "median_ms")
    axes.axhline(_floor_ms(largest, report), **FLOOR_STYLE)


def _memory_bars(axes: Axes, rows: list[Row], report: Report) -> None:
    _bars(axes, rows, "peak_extra_bytes", unit=1e6)


def _lines(axes: Axes, rows: list[Row], name: str) -> None:
    """Draw a figure over the size, a line for each rival."""
    for rival, (color, marker) in STYLES.items():
        series = [row for row in rows if row.rival == rival]
        width = 2.2 if rival == FUSED else 1.3
        sizes, values = [row.numel for row in series], _values(series, name)
        axes.plot(sizes, values, color=color, marker=marker, linewidth=width, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("elements")
    axes.grid(alpha=0.3)


def _bars(axes: Axes, rows: list[Row], name: str, unit: float = 1.0) -> Row:
    """Draw a bar for each rival at the largest size; return one of their rows."""
    most = max(row.numel for row in rows)
    largest = [row for row in rows if row.numel == most]
    values = [value / unit for value in _values(largest, name)]
    colors = [STYLES[row.rival][0] for row in largest]
    bars = axes.bar(range(len(values)), values, color=colors, width=0.7)
    axes.bar_label(bars, fmt=number, fontsize=8, padding=2)
    axes.margins(y=0.12)
    axes.set_xticks([])
    axes.set_xlabel(f"{most:,} elements")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    return largest[0]


def _values(rows: list[Row], name: str) -> list[float]:
    """Return what can be drawn: a figure that is unknown leaves a gap."""
    return [nan if getattr(row, name) is None else getattr(row, name) for row in rows]


def _floor_ms(row: Row, report: Report) -> float:
    return row.floor_bytes / report.copy_gbps / 1e6


OVER_SIZES = (("ms a step", _times), ("percent of the copy's bandwidth", _percents))
AT_LARGEST = (("ms a step", _time_bars), ("peak extra MB, gradient included", _memory_bars))
