"""`python -m bench` itself: measure the loss on this machine's best device against its rivals."""

import argparse
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench import COMMANDS, check, measure
from bench.host import host_us
from bench.measure import Action
from bench.report import (
    RESULTS,
    Report,
    Row,
    console,
    describe,
    explained,
    file_stem,
    print_report,
)
from bench.rivals import FUSED, RIVALS, Rival, Step, lines_of
from bench.workloads import CASES, Spec, Workload, build, rotation, specs

SECONDS, QUICK_SECONDS = 2.0, 0.5  # of timing, for all rivals of a workload together
HOST_SECONDS = 10.0  # what the host times may take, compilation of their kernels included
COUNT_SECONDS = 1.0  # what a rival's launches may take to count
LAST_SECONDS = 30.0  # kept for both of these
FIRST_COMPILE_SECONDS = 30.0  # what torch.compile may take before it has shown what it takes
MOST_COPIES = 64  # of a workload on a GPU; where more would fit, launching is the limit anyway
PROBLEM_CHARACTERS = 300
ALL = "all"  # the rival of a row that stands for a whole workload
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


class Clock:
    """How much time a run has left, and whether what comes next still fits into it.

    A run without a limit has no end. `reserved` seconds are kept for what comes last. torch.compile
    cannot be stopped half-way, so it starts only where twice the time that it took last is left.
    """

    def __init__(self, limit: float = inf) -> None:
        self.reserved = 0.0
        self.compile_seconds = FIRST_COMPILE_SECONDS / 2
        self._end = time.monotonic() + limit

    def why_not(self, seconds: float, compiles: bool = False) -> str | None:
        """Say why what takes so many seconds, and perhaps a compilation, is left out, or None."""
        needed = seconds + (2 * self.compile_seconds if compiles else 0.0)
        left = max(self._end - self.reserved - time.monotonic(), 0.0)
        return None if left >= needed else f"it may take {needed:.0f} s, and {left:.0f} s were left"


@dataclass
class Run:
    """Rivals on a device, so many seconds of timing for each workload, and what was found."""

    device: torch.device
    rivals: Sequence[Rival]
    seconds: float
    clock: Clock
    report: Report
    path: Path
    at: Callable[[str], None] = print  # is told what is being done

    def fill(self, specs: Sequence[Spec]) -> None:
        """Measure workload by workload, into report and file: an interruption loses only one."""
        out = console()
        # A bar is for eyes: in a pipe or a file it would only leave control characters.
        with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
            task = bar.add_task("", total=len(specs))
            self.at = lambda text: bar.update(task, description=text)
            for spec in specs:
                rows = self.rows(spec)
                self.report.rows += rows
                self.report.write(self.path)
                told = ", ".join(f"{row.rival} {row.median}" for row in rows)
                out.print(f"{spec}, ms: {told}", soft_wrap=True)
                bar.advance(task)

    def rows(self, spec: Spec) -> list[Row]:
        """Build a workload, check its rivals, time the right ones; return a row for each."""
        whole = Row(spec.name, ALL, spec.dtype_name, spec.numel, floor_bytes=0)
        left_out = self.clock.why_not(self.seconds)
        if left_out is not None:
            return [replace(whole, left_out=left_out)]
        try:
            return self._measured(build(spec, self.device))
        except Exception as error:  # no memory for the operands, or a package is missing
            return [replace(whole, problem=f"cannot be measured here: {_first_line(error)}")]

    def fill_launches(self, specs: Sequence[Spec]) -> None:
        """Count the launches on the first of `specs` of each case and type.

        It is done after all timing: a profiler may leave launches slower behind it.
        """
        firsts: dict[tuple[str, torch.dtype], Spec] = {}
        for spec in (spec for spec in specs if not spec.graph):
            firsts.setdefault((spec.case, spec.dtype), spec)
        by_name = {rival.name: rival for rival in self.rivals}
        for spec in firsts.values():
            torch.compiler.reset()
            built = cache(partial(build, spec, self.device))
            for at, row in enumerate(self.report.rows):
                key = (row.case, row.dtype, row.numel)
                if key == (spec.name, spec.dtype_name, spec.numel) and row.median_ms is not None:
                    rival = by_name[row.rival]
                    count = partial(self._count, at, rival, built)
                    what = f"launches of {row.rival} on {spec}"
                    self.attempt(what, COUNT_SECONDS, count, rival.compiles)
            self.report.write(self.path)

    def attempt(self, what: str, seconds: float, action: Action, compiles: bool = False) -> None:
        """Do what the rows can do without, or tell why not."""
        left_out = self.clock.why_not(seconds, compiles)
        if left_out is None:
            try:
                action()
            except Exception as error:
                left_out = _first_line(error)
        if left_out is not None:
            self.report.left_out.append(f"{what}: {left_out}")

    def _count(self, at: int, rival: Rival, built: Callable[[], Workload]) -> None:
        step = rival.step(built())
        step()  # compiles what compiles
        launches = measure.launches(step)
        self.report.rows[at] = replace(self.report.rows[at], launches=launches)

    def finish(self, work: Action, compared: str) -> int:
        """Do the work, or what Ctrl-C leaves of it, then write and print; return the status."""
        try:
            work()
            status = int(any(row.problem is not None for row in self.report.rows))
        except KeyboardInterrupt:
            self.report.left_out.append("Interrupted: this is what was measured until then.")
            status = INTERRUPTED
        self.report.write(self.path)
        print_report(self.report, compared, lines_of(self.rivals))
        print(f"Wrote {self.path}.")
        return status

    def _measured(self, workload: Workload) -> list[Row]:
        spec, device = workload.spec, self.device
        torch.compiler.reset()  # else a new shape would be taken for a dynamic one
        truth = check.expected(workload)
        # On a CPU operands are not rotated.
        cache = (
            torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        )
        copies = rotation(workload, cache, MOST_COPIES)
        numel, floor = workload.input.numel(), workload.floor_bytes
        steps: dict[str, list[Step]] = {}
        rows: dict[str, Row] = {}
        for rival in self.rivals:
            if not rival.is_rival_of(workload):
                continue
            row = Row(spec.name, rival.name, spec.dtype_name, numel, floor)
            left_out = self.clock.why_not(self.seconds, rival.compiles)
            if left_out is None:
                self.at(f"{spec}: checking {rival.name}")
                began = time.monotonic()
                try:
                    own = [rival.step(copy) for copy in copies]
                    if spec.graph:
                        own = [measure.replayed(own, device)]
                    problem = check.problem(workload, truth, *own[0]())
                except Exception as error:  # whatever a rival lacks, the others can be timed
                    problem = f"cannot run here: {_first_line(error)}"
                if rival.compiles:
                    self.clock.compile_seconds = time.monotonic() - began
                if problem is None:
                    steps[rival.name] = own
                row = replace(row, problem=problem)
            rows[rival.name] = replace(row, left_out=left_out)
        del truth
        self.at(f"{spec}: timing")
        in_one = len(copies) if spec.graph else 1
        for name, timing in measure.measure(steps, device, self.seconds, in_one).items():
            gbps = floor / timing.median_ms / 1e6
            # What a graph needs was taken when it was captured.
            peak = None if spec.graph else measure.peak_extra_bytes(steps[name][0], device)
            figures: dict[str, Any] = {**timing._asdict(), "gbps": gbps, "peak_extra_bytes": peak}
            figures["percent_of_copy"] = 100 * gbps / self.report.copy_gbps
            rows[name] = replace(rows[name], **figures)
        return list(rows.values())


def begin(options: argparse.Namespace, rivals: Sequence[Rival], seconds: float, name: str) -> Run:
    """Return a run with the options of `parser_of`, whose file has this name and the device's."""
    clock, device = Clock(options.limit), options.device
    report = Report(describe(device), measure.copy_gbps(device))
    path = options.out / f"{name.format(file_stem(device))}.json"
    return Run(device, rivals, seconds, clock, report, path)


def parser_of(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of what every measuring command understands."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the results")
    parser.add_argument(
        "--limit",
        type=float,
        default=inf,
        metavar="SECONDS",
        help="after which nothing new is begun: what is left out, the file says",
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    named = "cpu, cuda, or cuda:1 and so on (default: the best there is)"
    parser.add_argument("--device", type=device_named, default=best, help=named)
    return parser


def device_named(name: str) -> torch.device:
    """Return the device; a GPU with a number becomes the current one.

    Raises:
        ArgumentTypeError: if it is not measured, or not there.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise argparse.ArgumentTypeError(f"{name!r} is not measured; use cpu, cuda or cuda:NUMBER")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"PyTorch sees no CUDA device here for {name!r}")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 0, 1 if something failed, or 130 if it was interrupted."""
    parser = parser_of("python -m bench", __doc__ or "")
    parser.epilog = "\n\n".join(
        [
            explained("Workloads", CASES),
            explained("Rivals", lines_of(RIVALS)),
            f"Other commands: {', '.join(COMMANDS)}; each has a --help of its own.",
        ]
    )
    parser.add_argument("--quick", action="store_true", help="three workloads, under 40 s")
    busy = "with a process that spins for each of PyTorch's threads"
    parser.add_argument("--busy", action="store_true", help=busy)
    options = parser.parse_args(arguments)
    # A quick run never takes a full run's place, nor a busy one an idle one's.
    name = "{}" + "-quick" * options.quick + "-busy" * options.busy
    seconds = QUICK_SECONDS if options.quick else SECONDS
    if options.quick:
        # Read when Inductor is loaded, which else tries the C++ compiler on vector code for
        # seconds. Where that cannot do it, the compiled rivals are reported as unable to run.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    busy_cores = torch.get_num_threads() if options.busy else 0
    with measure.cores_kept_busy(busy_cores):
        run = begin(options, RIVALS, seconds, name)
        run.report.busy_cores = busy_cores
        status = run.finish(partial(_work, run, options.quick), compared=FUSED)
    if options.limit == inf:
        # Imported here because it needs seconds, as drawing does: no time for them under a limit.
        from bench.plot import write_plots

        write_plots(run.report, run.path)
    else:
        print(f"`python -m bench plot {run.path}` draws it.")
    return status


def _work(run: Run, quick: bool) -> None:
    """Measure all that belongs to the benchmark."""
    listed = specs(run.device, quick)
    run.clock.reserved = LAST_SECONDS
    run.fill(listed)
    run.clock.reserved = 0.0
    host = partial(host_us, run.device)
    run.attempt("host times", HOST_SECONDS, lambda: run.report.host_us.update(host()))
    run.report.write(run.path)
    if run.device.type == "cuda":  # A CPU has no launches.
        run.fill_launches(listed)


def _first_line(error: Exception) -> str:
    """Return an exception's kind and the beginning of what it says."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:PROBLEM_CHARACTERS]
