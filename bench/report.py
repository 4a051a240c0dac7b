"""What a run found: the machine, the rows, and the JSON file."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.measure import Timing

TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu")


@dataclass(frozen=True)
class Row:
    """One provider on one workload; None where a figure is unknown.

    `gbps` (1e9 bytes/s) is the floor's bytes over the median, whatever a provider really moved,
    and `percent_of_copy` sets it against the device's copy. A provider that is wrong or cannot
    run here has a `problem` in words and no figures; one for which no time was left has `left_out`.
    """

    case: str
    provider: str
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


@dataclass
class Report:
    """A run on one device."""

    device: str
    driver: str | None
    torch: str
    triton: str | None
    python: str
    copy_gbps: float
    rows: list[Row] = field(default_factory=list)
    # Milliseconds of forward + backward of a call too small for the device to matter.
    host: dict[str, Timing] = field(default_factory=dict)
    # What no row tells of.
    left_out: list[str] = field(default_factory=list)

    def groups(self) -> Iterator[tuple[tuple[str, str], list[Row]]]:
        """Yield ((case, dtype), its rows), all in the order in which they were measured."""
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault((row.case, row.dtype), []).append(row)
        yield from grouped.items()

    def write_json(self, path: Path) -> None:
        """Write the figures."""
        write_whole(path, json.dumps(self._plain(), indent=1) + "\n")

    def _plain(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["rows"] = [{key: _rounded(row[key]) for key in row} for row in plain["rows"]]
        plain["copy_gbps"] = _rounded(self.copy_gbps)
        plain["host_us"] = {
            name: {key.removesuffix("_ms"): _rounded(1e3 * ms) for key, ms in timing.items()}
            for name, timing in plain.pop("host").items()
        }
        return plain


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all: what was there stays until all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def read_json(path: Path) -> Report:
    """Return the report that was written there, its host times left out."""
    plain = json.loads(path.read_text())
    plain.pop("host_us")
    rows = [Row(**row) for row in plain.pop("rows")]
    return Report(**plain, rows=rows)


def describe(device: torch.device, copy_gbps: float) -> Report:
    """Return a report without rows: the device and the versions."""
    return Report(
        device=_device_name(device),
        driver=_driver(device),
        torch=torch.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        copy_gbps=copy_gbps,
    )


def file_stem(report: Report, device: torch.device, quick: bool) -> str:
    """Name a run's files after its device; a quick run never takes a full run's place."""
    stem = "cpu"
    if device.type != "cpu":
        stem = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    return f"{stem}-quick" if quick else stem


def _rounded(value: Any) -> Any:
    """Keep five digits of a measured number: more would be noise."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if named:
            return named[1].strip()
    return platform.processor() or platform.machine()


def _driver(device: torch.device) -> str | None:
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else None


def _triton_version() -> str | None:
    """Read Triton's version from its metadata: it need not be imported to be named."""
    for package in TRITON_PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
