"""The rows of a run as tables on the console, one per case and type."""

from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.host import NUMEL
from bench.measure import Timing
from bench.providers import FUSED
from bench.report import Report, Row

PLAIN_WIDTH = 150  # columns where the output is no terminal: wider than any table here
MISSING = "-"
HEADINGS = (
    "median\nms",
    "20th\nms",
    "80th\nms",
    "fused\nis",
    "floor\nMB",
    "GB/s",
    "of\ncopy",
    "peak\nextra MB",
    "launches",
)


def console() -> Console:
    """Return the console; a pipe or a file has no width of its own, so it gets enough."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=PLAIN_WIDTH)


def print_report(out: Console, report: Report) -> None:
    """Print the machine, a table per case, every problem in words, and how to read it."""
    versions = f"torch {report.torch}, triton {report.triton or 'none'}, Python {report.python}"
    driver = f", driver {report.driver}" if report.driver else ""
    out.print(f"\n[bold]{report.device}[/]{driver}\n{versions}", highlight=False)
    for (case, dtype), rows in report.groups():
        out.print()
        out.print(_table(f"{case}, {dtype}", rows))
    if report.host:
        out.print()
        out.print(_host_table(report.host))
    for text in report.left_out:
        out.print(Text(text, style="yellow"))
    for row in report.rows:
        for reason, style in ((row.problem, "red"), (row.left_out, "yellow")):
            if reason is not None:
                text = f"{row.provider} on {row.case} {row.numel:,} {row.dtype}: {reason}"
                out.print(Text(text, style=style))
    out.print(
        "\nMilliseconds a step: forward + backward, or forward alone (kernelbench). fused is: how"
        " many times as fast as the\nrow's provider. Floor: bytes that no program can avoid moving;"
        " GB/s: floor / median; of copy: GB/s against this\ndevice's copy,"
        f" {report.copy_gbps:.1f} GB/s read + written (small operands stay in a cache and can beat"
        " it). Peak extra: most bytes\nlive at once beyond the operands, the gradient included.",
        highlight=False,
    )


def print_progress(out: Console, rows: list[Row]) -> None:
    """Print a line with what was just measured, for the log of a run that may be stopped."""
    times = (
        f"{row.provider} {'failed' if row.problem else 'left out'}"
        if row.median_ms is None
        else f"{row.provider} {_number(row.median_ms, 4)}"
        for row in rows
    )
    name = f"{rows[0].case} {rows[0].numel:,} {rows[0].dtype}"
    out.print(f"{name}, ms: {', '.join(times)}", highlight=False, soft_wrap=True)


def _host_table(host: dict[str, Timing]) -> Table:
    table = Table(
        title=f"host time, {NUMEL:,} elements",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("call")
    for heading in ("median\nus", "20th\nus", "80th\nus"):
        table.add_column(heading, justify="right")
    for name, timing in host.items():
        micros = (1e3 * ms for ms in (timing.median_ms, timing.p20_ms, timing.p80_ms))
        table.add_row(name, *(f"{us:.1f}" for us in micros))
    return table


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    # In a narrow terminal a cell folds: no figure is ever cut off.
    table.add_column("elements", justify="right", overflow="fold")
    table.add_column("provider", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", overflow="fold")
    for numel, group in groupby(rows, key=lambda row: row.numel):
        same_size = list(group)
        fused = next((row.median_ms for row in same_size if row.provider == FUSED), None)
        for index, row in enumerate(same_size):
            cells = [f"{numel:,}" if index == 0 else "", row.provider, *_figures(row, fused)]
            table.add_row(*cells, style="bold green" if row.provider == FUSED else None)
        table.add_section()
    return table


def _figures(row: Row, fused_ms: float | None) -> list[str]:
    if row.median_ms is None:
        return ["left out" if row.left_out else "failed", *[MISSING] * (len(HEADINGS) - 1)]
    times = row.median_ms / fused_ms if row.median_ms and fused_ms else None
    return [
        _number(row.median_ms, 4),
        _number(row.p20_ms, 4),
        _number(row.p80_ms, 4),
        MISSING if times is None or row.provider == FUSED else f"{times:.2f}x",
        _number(row.floor_bytes / 1e6, 4),
        _number(row.gbps, 4),
        MISSING if row.percent_of_copy is None else f"{row.percent_of_copy:.0f}%",
        MISSING if row.peak_extra_bytes is None else _number(row.peak_extra_bytes / 1e6, 4),
        MISSING if row.launches is None else str(row.launches),
    ]


def _number(value: float | None, digits: int) -> str:
    """Show a number with so many digits, never with an exponent."""
    if value is None:
        return MISSING
    if value >= 10**digits:
        return f"{value:,.0f}"
    whole = len(str(int(value))) if value >= 1 else 0
    return f"{value:.{max(digits - max(whole, 1), 0)}f}"
