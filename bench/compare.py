"""`python -m bench` itself: measure the loss on this machine's best device against its rivals."""

import argparse
import os
from collections.abc import Sequence
from math import inf
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from bench import COMMANDS
from bench.cases import specs
from bench.host import host_timings
from bench.measure import copy_gbps, device_named
from bench.report import Report, describe, file_stem
from bench.suite import (
    QUICK_SECONDS,
    SECONDS,
    Clock,
    Conditions,
    Progress,
    count_launches,
    first_line,
    run,
)
from bench.table import console, print_progress, print_report

RESULTS = Path(__file__).parent / "results"
HOST_SECONDS = 5.0  # what the host times may take, compilation of their kernels included
LAST_SECONDS = 30.0  # kept for them, and for counting launches
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 0, 1 if something failed, or 130 if it was interrupted."""
    options = _parser().parse_args(arguments)
    clock = Clock(options.limit, reserved=LAST_SECONDS)
    if options.quick:
        _skip_compiler_probes()
    device = device_named(options.device)
    out = console()
    report = describe(device, copy_gbps(device))
    path = options.out / f"{file_stem(report, device, options.quick)}.json"
    interrupted = _fill(report, device, options.quick, clock, path, out)

    print_report(out, report)
    report.write_json(path)
    if options.limit == inf:
        # Imported here because it needs seconds, as drawing does: no time for them under a limit.
        from bench.plot import write_plots

        write_plots(report, path)
    out.print(f"Wrote {path}; `python -m bench plot` draws it.", highlight=False)
    if interrupted:
        out.print("Interrupted: the tables and the file hold what was measured until then.")
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
    parser.add_argument(
        "--limit",
        type=float,
        default=inf,
        metavar="SECONDS",
        help="after which nothing new is begun, nor drawn: what is left out, the file says",
    )
    parser.add_argument("--device", help='as torch names it: "cpu", "cuda", "cuda:1" (the best)')
    return parser


def _skip_compiler_probes() -> None:
    """Save a cold torch.compile the seconds in which it tries the C++ compiler on vector code.

    What it generates is the same wherever the compiler knows the processor's instructions; where
    it does not, the compiled rivals are reported as unable to run. Read when Inductor is loaded.
    """
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def _fill(
    report: Report, device: torch.device, quick: bool, clock: Clock, path: Path, out: Console
) -> bool:
    """Measure into the report and its file under a progress bar; return whether Ctrl-C ended it."""
    chosen = specs(device, quick)
    seconds = QUICK_SECONDS if quick else SECONDS
    conditions = Conditions(device, report.copy_gbps, seconds, clock)
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
            for rows in run(chosen, conditions, progress):
                report.rows += rows
                report.write_json(path)
                print_progress(out, rows)
            clock.reserved = 0.0
            left_out = clock.why_not(HOST_SECONDS)
            if left_out is None:
                try:
                    report.host |= host_timings(device)
                except Exception as error:  # the rows and their tables come all the same
                    left_out = first_line(error)
            if left_out is not None:
                report.left_out.append(f"host times: {left_out}")
            report.write_json(path)
            if device.type == "cuda":  # A CPU has none.
                for _ in count_launches(report, chosen, conditions):
                    report.write_json(path)
        except KeyboardInterrupt:
            return True
    return False
