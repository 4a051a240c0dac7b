"""What a run found: the machine and the rows, as a JSON file and as tables on the console."""

import json
import platform
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils import collect_env

from bench.workloads import CASES, GRAPH

RESULTS = Path(__file__).parent / "results"
PLAIN_WIDTH = 150  # columns where the output is no terminal: wider than any table here
TEXT_WIDTH = 100  # columns of what is to be read, not compared
MISSING = "-"
HEADINGS = (
    *("median\nms", "20th\nms", "80th\nms", "{}\nis"),
    *("floor\nMB", "GB/s", "of\ncopy", "extra\nMB", "launches"),
)
LEGEND = """
Milliseconds a step: forward + backward, or forward alone (kernelbench). "{} is": how many times as
fast as the row's rival. Floor: bytes that no program can avoid moving. GB/s: floor / median. Of
copy: GB/s against this device's copy, {:.1f} GB/s read + written (reads alone can beat it, and so
can small operands, which stay in a cache). Extra: most bytes live at once beyond the operands, the
gradient included."""


@dataclass(frozen=True)
class Machine:
    """What a run was measured on; None where there is none."""

    device: str
    driver: str | None
    torch: str
    triton: str | None
    python: str

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        versions = f"torch {self.torch}, triton {self.triton or 'none'}, Python {self.python}"
        return f"{self.device}{driver}\n{versions}"


@dataclass(frozen=True)
class Row:
    """One rival on one workload; None where a figure is unknown.

    `gbps` (1e9 bytes/s) is the floor's bytes over the median, whatever a rival really moved, and
    `percent_of_copy` sets it against the device's copy. A rival that is wrong or cannot run here
    has a `problem` in words and no figures; one for which no time was left has `left_out`.
    """

    case: str
    rival: str
    dtype: str
    numel: int
    floor_bytes: int
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gbps: float | None = None
    percent_of_copy: float | None = None
    peak_extra_bytes: int | None = None
    launches: int | None = None
    problem: str | None = None
    left_out: str | None = None

    @property
    def median(self) -> str:
        """The median in milliseconds, or a word for why there is none."""
        if self.median_ms is None:
            return "left out" if self.left_out else "failed"
        return number(self.median_ms)


@dataclass
class Report:
    """A run on one machine."""

    machine: Machine
    copy_gbps: float  # 1e9 bytes a second, read and written
    busy_cores: int = 0  # that other processes wanted too
    rows: list[Row] = field(default_factory=list)
    host_us: dict[str, dict[str, float]] = field(default_factory=dict)  # of small calls
    left_out: list[str] = field(default_factory=list)  # what no row tells of

    @property
    def load(self) -> str:
        """What else the machine had to do, for titles."""
        return f", {self.busy_cores} cores kept busy" if self.busy_cores else ""

    def groups(self) -> Iterator[tuple[tuple[str, str], list[Row]]]:
        """Yield ((case, dtype), its rows), all in the order in which they were measured."""
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault((row.case, row.dtype), []).append(row)
        yield from grouped.items()

    def write(self, path: Path) -> None:
        """Write the figures."""
        rows = [{key: v for key, v in vars(row).items() if v is not None} for row in self.rows]
        plain = {**vars(self), "rows": rows}
        write_json(path, {**asdict(plain.pop("machine")), **plain})


def read(path: Path) -> Report:
    """Return the report that was written there."""
    plain = json.loads(path.read_text())
    machine = Machine(**{name: plain.pop(name) for name in Machine.__dataclass_fields__})
    rows = [Row(**row) for row in plain.pop("rows")]
    return Report(machine, rows=rows, **plain)


def write_json(path: Path, plain: dict[str, Any]) -> None:
    """Write a file with a line for each field and each item of a list, whole or not at all.

    What was there stays until all is written.
    """
    fields = []
    for key, value in _rounded(plain).items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        fields.append(f"{json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("{\n " + ",\n ".join(fields) + "\n}\n")
    unfinished.replace(path)


def describe(device: torch.device) -> Machine:
    """Name the device, its driver, and the versions."""
    driver, packages = None, metadata.packages_distributions()
    if device.type == "cuda":
        driver = collect_env.get_nvidia_driver_version(collect_env.run)
    # From the metadata: it need not be imported to be named. ROCm's has a name of its own.
    triton = metadata.version(packages["triton"][0]) if "triton" in packages else None
    versions = torch.__version__, triton, platform.python_version()
    return Machine(_device_name(device), driver, *versions)


def file_stem(device: torch.device) -> str:
    """Name a run's files after its device."""
    name = re.sub(r"\W+", "-", _device_name(device).lower()).strip("-")
    return "cpu" if device.type == "cpu" else name


def console() -> Console:
    """Return the console; a pipe or a file has no width of its own, so it gets enough."""
    probe = Console(highlight=False)
    return probe if probe.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def table(title: str, names: Iterable[str], figures: Iterable[str]) -> Table:
    """Return an empty table with columns of names, then columns of figures."""
    look: Any = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    empty = Table(title=title, title_justify="left", title_style="bold", **look)
    # In a narrow terminal a cell folds: no figure is ever cut off.
    for name in names:
        empty.add_column(name, overflow="fold")
    for figure in figures:
        empty.add_column(figure, justify="right", overflow="fold")
    return empty


def print_report(report: Report, compared: str, rivals: Mapping[str, str]) -> None:
    """Print the machine, a table per case, every problem in words, and how to read it.

    `compared` is the rival with which the others are compared; `rivals` says what they are.
    """
    out = console()
    out.print(f"\n{report.machine}{report.load}")
    for (case, dtype), rows in report.groups():
        out.print(_table(f"{case}, {dtype}", rows, compared))
    if report.host_us:
        out.print(host_table(report.host_us))
    reasons = list(report.left_out)
    for row in report.rows:
        if row.problem or row.left_out:
            named = f"{row.rival} on {row.case} {row.numel:,} {row.dtype}"
            reasons.append(f"{named}: {row.problem or row.left_out}")
    for reason in reasons:
        out.print(Text(reason, style="yellow"))
    out.print(LEGEND.format(compared, report.copy_gbps))
    cases = {part for row in report.rows for part in row.case.partition(GRAPH)}
    names = {row.rival for row in report.rows}
    for title, lines, found in (("Workloads", CASES, cases), ("Rivals", rivals, names)):
        occurring = {name: line for name, line in lines.items() if name in found}
        if occurring:
            out.print(f"\n{explained(title, occurring)}")


def explained(title: str, lines: Mapping[str, str]) -> str:
    """Return a title, and below it each name with what is said of it, wrapped."""
    column = max(map(len, lines)) + 2
    texts = [
        textwrap.fill(
            line,
            TEXT_WIDTH,
            initial_indent=f"  {name:{column}}",
            subsequent_indent=" " * (column + 2),
            break_on_hyphens=False,
        )
        for name, line in lines.items()
    ]
    return "\n".join([f"{title}:", *texts])


def host_table(times: dict[str, dict[str, float]]) -> Table:
    """Show what `host.host_us` returns."""
    headings = ["fused us", "torch us", "composition us", "fused / torch", "/ composition"]
    headings += ["first call ms"]
    filled = table("host time of a small call, forward + backward", ["call"], headings)
    for call, own in times.items():
        composition = own.get("composition_us")
        filled.add_row(
            call,
            *(number(own["fused_us"]), number(own["torch_us"]), number(composition)),
            f"{own['ratio']:.2f}",
            MISSING if composition is None else f"{own['fused_us'] / composition:.2f}",
            number(own.get("first_ms")),
        )
    return filled


def number(value: float | None) -> str:
    """Show four digits of a number, never with an exponent, or that there is none."""
    if value is None:
        return MISSING
    return f"{value:,.{max(4 - len(str(int(value))), 0)}f}"


def _table(title: str, rows: list[Row], compared: str) -> Table:
    filled = table(title, ["elements", "rival"], [text.format(compared) for text in HEADINGS])
    for numel, group in groupby(rows, key=lambda row: row.numel):
        of_size = list(group)
        base = next((row.median_ms for row in of_size if row.rival == compared), None)
        for index, row in enumerate(of_size):
            extra, share = row.peak_extra_bytes, row.percent_of_copy
            filled.add_row(
                "" if index else f"{numel:,}",
                *(row.rival, row.median, number(row.p20_ms), number(row.p80_ms)),
                f"{row.median_ms / base:.2f}x" if row.median_ms and base else MISSING,
                *(number(row.floor_bytes / 1e6 or None), number(row.gbps)),
                MISSING if share is None else f"{share:.0f}%",
                MISSING if extra is None else number(extra / 1e6),
                str(row.launches or MISSING),
                style="bold green" if row.rival == compared else None,
            )
        filled.add_section()
    return filled


def _rounded(value: Any) -> Any:
    """Keep five digits of measured numbers: more would be noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = named[1] if named else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
