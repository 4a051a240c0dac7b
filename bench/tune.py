"""`python -m bench tune`: measure the variants of `bench.experiments`, in one call.

Those of the kernel where there is a GPU, those of the eager backend elsewhere. Every variant is
checked against the composition in float64 and then timed, interleaved with the code as it is.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import check, measure
from bench.cases import Spec, Workload, build, rotation
from bench.experiments import AS_BUILT, EXPERIMENTS, Experiment, Variant, backends
from bench.report import describe, file_stem, write_whole
from bench.suite import ALL, MOST_COPIES, Clock
from bench.table import console
from fused_smoothl1.autograd import apply
from fused_smoothl1.contract import Problem, make_problem

RESULTS = Path(__file__).parent / "results"
SECONDS = 1.5  # of timing a workload
WORKLOAD_SECONDS = 10.0  # what one may take, with the kernels of its variants compiled
LEAST_GAIN = 0.02  # what a variant must save on one workload to be worth a look
Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """One variant on one workload; `ratio` is its time over that of the code as it is."""

    experiment: str
    workload: str
    variant: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    problem: str | None = None
    left_out: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Run the experiments; return 1 if a variant is wrong or cannot run."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the JSON")
    parser.add_argument("--device", help='as torch names it: "cpu", "cuda" (the best)')
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--only", action="append", choices=names, help="one experiment, or several")
    parser.add_argument(
        "--limit",
        type=float,
        default=inf,
        metavar="SECONDS",
        help="after which nothing new is begun: what is left out, the file says",
    )
    options = parser.parse_args(arguments)
    clock = Clock(options.limit)
    device = measure.device_named(options.device)
    backend = "triton" if device.type == "cuda" else "eager"
    chosen = [experiment for experiment in EXPERIMENTS if experiment.backend == backend]
    if options.only:
        chosen = [experiment for experiment in chosen if experiment.name in options.only]
    if not chosen:
        parser.error(f"--only names no experiment of the {backend} backend, which {device} has")
    out = console()
    report = describe(device, measure.copy_gbps(device))
    out.print(f"[bold]{report.device}[/], copy {report.copy_gbps:.0f} GB/s", highlight=False)
    path = options.out / f"tune-{file_stem(report, device, quick=False)}.json"
    rows: list[Row] = []
    for experiment in chosen:
        found: list[Row] = []
        for measured in run(experiment, device, clock):
            found += measured
            # After each workload: a call that is cut short has measured the rest.
            _write(path, report, rows + found)
        rows += found
        out.print(_table(experiment, found))
    _print_candidates(out, rows)
    return int(any(row.problem for row in rows))


def run(experiment: Experiment, device: torch.device, clock: Clock) -> Iterator[list[Row]]:
    """Yield, for each workload, a row for each variant, or one that says why there are none."""
    variants = (AS_BUILT, *experiment.variants)
    with backends(variants, experiment.backend) as loaded:
        for spec in (Spec(*workload) for workload in experiment.workloads):
            left_out = clock.why_not(WORKLOAD_SECONDS)
            if left_out is None:
                pairs = dict(zip(variants, loaded, strict=True))
                yield _measured(experiment.name, spec, pairs, device)
            else:
                yield [Row(experiment.name, str(spec), ALL, left_out=left_out)]


def _measured(
    experiment: str, spec: Spec, backends: dict[Variant, Any], device: torch.device
) -> list[Row]:
    workload = build(spec, device)
    truth = check.expected(workload)
    copies = list(rotation(workload, measure.cache_bytes(device), MOST_COPIES))
    steps: dict[str, list[Step]] = {}
    rows: list[Row] = []
    for variant, backend in backends.items():
        try:
            own = [step_of(copy, backend) for copy in copies]
            wrong = check.problem(workload, truth, *own[0]())
        except Exception as error:  # a variant that does not compile is a result too
            wrong = f"cannot run here: {type(error).__name__}: {error}".splitlines()[0]
        if wrong is None:
            steps[variant.name] = own
        else:
            rows.append(Row(experiment, str(spec), variant.name, problem=wrong))
    timings = measure.measure(steps, device, SECONDS) if steps else {}
    for name, timing in timings.items():
        built = timings.get(AS_BUILT.name)
        ratio = timing.median_ms / built.median_ms if built else None
        rows.append(Row(experiment, str(spec), name, **asdict(timing), ratio=ratio))
    return rows


def step_of(workload: Workload, backend: Any) -> Step:
    """Return a forward and backward of the workload that this backend computes."""
    problem = _problem_of(workload)
    operands = problem[:4]

    def step() -> tuple[Tensor, Tensor]:
        loss = apply(*operands, problem, backend)
        (gradient,) = torch.autograd.grad(loss, workload.input, upstream)
        return loss.detach(), gradient

    upstream = torch.full_like(apply(*operands, problem, backend), workload.loss_scale)
    return step


def _problem_of(workload: Workload) -> Problem:
    inside, outside = workload.inside_weights, workload.outside_weights
    return make_problem(
        workload.input,
        workload.target,
        1.0 if inside is None else inside,
        1.0 if outside is None else outside,
        workload.divisor,
        workload.sigma,
        None,
        True,
    )


def _table(experiment: Experiment, rows: list[Row]) -> Table:
    table = Table(
        title=f"{experiment.name}\n{experiment.prediction}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("workload", "variant"):
        table.add_column(heading)
    for heading in ("median ms", "20th", "80th", "of as built"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (row.median_ms, row.p20_ms, row.p80_ms, row.ratio)
        missing = row.problem or (row.left_out and f"left out: {row.left_out}") or "-"
        cells = [missing if f is None else f"{f:.4g}" for f in figures]
        table.add_row(row.workload, row.variant, *cells)
    return table


def _print_candidates(out: Console, rows: list[Row]) -> None:
    worth = [row for row in rows if row.ratio is not None and row.ratio < 1 - LEAST_GAIN]
    for row in sorted(worth, key=lambda row: row.ratio or 1.0):
        out.print(f"{row.ratio:.3f} of as built: {row.variant} on {row.workload}", highlight=False)
    if not worth:
        out.print(f"No variant saves more than {100 * LEAST_GAIN:.0f}%.", highlight=False)


def _write(path: Path, report: Any, rows: list[Row]) -> None:
    machine = {key: getattr(report, key) for key in ("device", "driver", "torch", "triton")}
    rounded = [asdict(row) for row in rows]
    write_whole(path, json.dumps({**machine, "rows": rounded}, indent=1) + "\n")
