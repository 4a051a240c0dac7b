"""The rows of a run as pictures; `python -m bench plot FILE` draws those of an earlier run.

One with a column per case: time, percent of the copy, and at the largest size a bar per provider
for time and for memory. One small enough for a README: the bars of the dense case.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.providers import FUSED, PROVIDERS
from bench.report import Report, Row, read_json

STYLES = {
    "eager_classic": ("#8c8c8c", "v"),
    "eager_composition": ("#c58b2a", "s"),
    "compile": ("#5b8fd6", "^"),
    "compile_grad_and_value": ("#7a4fb5", "D"),
    "flag_gems": ("#c0504d", "P"),
    FUSED: ("#0b7a3b", "o"),
}
FLOOR_STYLE: dict[str, Any] = {"color": "black", "linestyle": (0, (2, 2)), "linewidth": 1.0}
COLUMN_INCHES, ROW_INCHES = 3.3, 3.1
FULL = 100.0  # percent
MEGABYTE = 1e6
TIME = "ms a step"
MEMORY = "peak extra MB, gradient included"
WIDE_INCHES = 12  # the legend needs this much to stand in one line
ROOM = 1.12  # empty space kept above the highest mark


def main(arguments: Sequence[str]) -> int:
    """Draw the pictures of a report that was written before."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.add_argument("report", type=Path, nargs="+", help="JSON of `python -m bench`")
    for path in parser.parse_args(arguments).report:
        write_plots(read_json(path), path)
    return 0


def write_plots(report: Report, path: Path) -> None:
    """Draw both pictures beside the report's file."""
    write_plot(report, path.with_suffix(".png"))
    write_summary(report, path.with_name(f"{path.stem}-summary.png"))


def write_plot(report: Report, path: Path) -> None:
    """Draw the whole report."""
    groups = list(_timed_groups(report))
    if not groups:
        return
    figure, axes = plt.subplots(
        4,
        len(groups),
        figsize=(max(COLUMN_INCHES * len(groups), 9.0), 4 * ROW_INCHES + 1.1),
        squeeze=False,
        layout="constrained",
    )
    for column, ((case, dtype), timed) in enumerate(groups):
        time, percent, bars, memory = (line[column] for line in axes)
        time.set_title(f"{case}\n{dtype}", fontsize=10, fontweight="bold")
        _time_lines(time, timed, report.copy_gbps)
        _percent_lines(percent, timed)
        largest = _largest(timed)
        _time_bars(bars, largest, report.copy_gbps)
        _memory_bars(memory, largest)
    for line, label in zip(
        axes, (TIME, "percent of the copy bandwidth", TIME, MEMORY), strict=True
    ):
        line[0].set_ylabel(label)
    _title_and_legend(figure, report)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_summary(report: Report, path: Path) -> None:
    """Draw time and memory of the dense case in its first type, at the largest size."""
    for (case, dtype), timed in _timed_groups(report):
        if case != "dense":
            continue
        largest = _largest(timed)
        figure, (time, memory) = plt.subplots(1, 2, figsize=(9.0, ROW_INCHES), layout="constrained")
        _time_bars(time, largest, report.copy_gbps)
        time.set_title(TIME, fontsize=10)
        _memory_bars(memory, largest)
        memory.set_title(MEMORY, fontsize=10)
        figure.suptitle(
            f"{largest[0].numel:,} {dtype} elements, both weights: {report.device}", fontsize=11
        )
        _legend(figure)
        figure.savefig(path, dpi=100)
        plt.close(figure)
        return


def _timed_groups(report: Report) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Yield the report's groups without what failed or was left out, where anything is left."""
    for key, rows in report.groups():
        timed = [row for row in rows if row.median_ms is not None]
        if timed:
            yield key, timed


def _largest(rows: list[Row]) -> list[Row]:
    most = max(row.numel for row in rows)
    return [row for row in rows if row.numel == most]


def _title_and_legend(figure: Figure, report: Report) -> None:
    versions = f"torch {report.torch}, triton {report.triton or 'none'}"
    copy = f"copy {report.copy_gbps:.1f} GB/s read + written"
    figure.suptitle(
        f"Smooth L1 with weights: {report.device}, {versions}, {copy}", fontsize=11, x=0.5
    )
    _legend(figure)


def _legend(figure: Figure) -> None:
    entries = [
        Line2D([], [], color=color, marker=marker, label=name)
        for name, (color, marker) in STYLES.items()
    ]
    entries.append(Line2D([], [], label="floor: bytes / copy bandwidth", **FLOOR_STYLE))
    columns = len(entries) if figure.get_figwidth() > WIDE_INCHES else len(entries) // 2
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False)


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """Return each provider's rows by size, the fused one last: it is drawn on top."""
    ordered = sorted(rows, key=lambda row: row.numel)
    return {p.name: [row for row in ordered if row.provider == p.name] for p in PROVIDERS}


def _points(figures: Iterable[float | None]) -> list[float]:
    """Return what can be drawn: a figure that is unknown leaves a gap."""
    return [nan if figure is None else figure for figure in figures]


def _time_lines(axes: Axes, rows: list[Row], copy_gbps: float) -> None:
    for name, series in _series(rows).items():
        color, marker = STYLES[name]
        sizes = [row.numel for row in series]
        medians = _points(row.median_ms for row in series)
        axes.plot(sizes, medians, color=color, marker=marker, **_weight(name))
        lower, upper = (
            _points(row.p20_ms for row in series),
            _points(row.p80_ms for row in series),
        )
        axes.fill_between(sizes, lower, upper, color=color, alpha=0.15, linewidth=0)
    floors = sorted({(row.numel, row.floor_bytes / copy_gbps / 1e6) for row in rows})
    axes.plot([size for size, _ in floors], [floor for _, floor in floors], **FLOOR_STYLE)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _percent_lines(axes: Axes, rows: list[Row]) -> None:
    for name, series in _series(rows).items():
        color, marker = STYLES[name]
        percents = _points(row.percent_of_copy for row in series)
        axes.plot(
            [row.numel for row in series], percents, color=color, marker=marker, **_weight(name)
        )
    axes.axhline(FULL, **FLOOR_STYLE)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, None)
    axes.set_xlabel("elements")
    axes.grid(alpha=0.3)


def _weight(name: str) -> dict[str, Any]:
    """Make the fused line the heavier one."""
    return (
        {"linewidth": 2.2, "markersize": 6}
        if name == FUSED
        else {"linewidth": 1.3, "markersize": 4}
    )


def _time_bars(axes: Axes, rows: list[Row], copy_gbps: float) -> None:
    _bars(axes, rows, _points(row.median_ms for row in rows))
    if rows:
        axes.axhline(rows[0].floor_bytes / copy_gbps / 1e6, **FLOOR_STYLE)
        axes.set_xlabel(f"{rows[0].numel:,} elements")


def _memory_bars(axes: Axes, rows: list[Row]) -> None:
    peaks = _points(row.peak_extra_bytes for row in rows)
    _bars(axes, rows, [peak / MEGABYTE for peak in peaks])
    if rows:
        axes.set_xlabel(f"{rows[0].numel:,} elements")


def _bars(axes: Axes, rows: list[Row], values: list[float]) -> None:
    colors = [STYLES[row.provider][0] for row in rows]
    bars = axes.bar(range(len(rows)), values, color=colors, width=0.7)
    axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axes.set_xticks([])
    highest = max((value for value in values if not isnan(value)), default=0.0)
    axes.set_ylim(0, highest * ROOM or None)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
