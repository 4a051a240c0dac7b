"""`python -m bench` itself: measure the loss on this machine's best device against its rivals."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from bench import COMMANDS
from bench.cases import specs
from bench.host import host_timings
from bench.measure import copy_gbps
from bench.plot import write_plot, write_summary
from bench.report import Report, describe, file_stem
from bench.suite import QUICK_SECONDS, SECONDS, Conditions, Progress, run
from bench.table import console, print_report

RESULTS = Path(__file__).parent / "results"
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 0, 1 if something failed, or 130 if it was interrupted."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _skip_compiler_probes()
    device = _device(options.device)
    out = console()
    report = describe(device, copy_gbps(device))
    interrupted = _fill(report, device, options.quick, out)
    if not interrupted:
        report.host |= host_timings(device)

    print_report(out, report)
    _write(report, options.out / file_stem(report, device, options.quick), out)
    if interrupted:
        out.print("Interrupted: the tables and files hold what was measured until then.")
        return INTERRUPTED
    return int(any(row.problem is not None for row in report.rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"Other commands: {', '.join(COMMANDS)}; each has a --help of its own.",
    )
    parser.add_argument("--quick", action="store_true", help="three workloads, under 40 s")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON and the plot go"
    )
    parser.add_argument("--device", help='as torch names it: "cpu", "cuda", "cuda:1" (the best)')
    return parser


def _skip_compiler_probes() -> None:
    """Save a cold torch.compile the seconds in which it tries the C++ compiler on vector code.

    What it generates is the same wherever the compiler knows the processor's instructions; where
    it does not, the compiled rivals are reported as unable to run. Read when Inductor is loaded.
    """
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        sys.exit(f"bench: device {name!r} is not measured; use cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("bench: --device cuda was asked for, and PyTorch sees no CUDA device here")
        torch.cuda.set_device(device)
    return device


def _fill(report: Report, device: torch.device, quick: bool, out: Console) -> bool:
    """Measure into the report under a progress bar; return whether Ctrl-C ended it."""
    chosen = specs(device, quick)
    conditions = Conditions(device, report.copy_gbps, QUICK_SECONDS if quick else SECONDS)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # A bar is for eyes: in a pipe or a file it would only leave control characters.
    with Bar(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=len(chosen))
        progress = Progress(
            at=lambda text: bar.update(task, description=text),
            advance=lambda share: bar.advance(task, share),
        )
        try:
            for row in run(chosen, conditions, progress):
                report.rows.append(row)
        except KeyboardInterrupt:
            return True
    return False


def _write(report: Report, stem: Path, out: Console) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    as_json, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    summary = stem.with_name(f"{stem.name}-summary.png")
    report.write_json(as_json)
    write_plot(report, picture)
    write_summary(report, summary)
    out.print(f"Wrote {as_json}, {picture.name} and {summary.name}.", highlight=False)
