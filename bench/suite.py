"""A run: every workload built, its providers checked, the right ones timed, rows made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from bench import check, measure
from bench.cases import Spec, Workload, build, dtype_name, rotation
from bench.providers import PROVIDERS, Step, forget_compiled
from bench.report import Row

SECONDS, QUICK_SECONDS = 2.0, 0.5  # of timing, for all providers of a workload together
MOST_COPIES = 64  # of a workload on a GPU; where more would fit, launching is the limit anyway
PROBLEM_CHARACTERS = 300


@dataclass(frozen=True)
class Conditions:
    """What holds for a whole run: the device, its copy bandwidth, seconds of timing a workload."""

    device: torch.device
    copy_gbps: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where a run tells what it is doing and how far it is, in shares of one workload."""

    at: Callable[[str], None]
    advance: Callable[[float], None]


def run(specs: list[Spec], conditions: Conditions, progress: Progress) -> Iterator[Row]:
    """Yield the rows of one workload after the other, so that an interruption loses only one."""
    for spec in specs:
        yield from _workload_rows(spec, conditions, progress)


def _workload_rows(spec: Spec, conditions: Conditions, progress: Progress) -> list[Row]:
    device = conditions.device
    forget_compiled()
    progress.at(f"{spec}: operands")
    workload = build(spec, device)
    truth = check.expected(workload)
    copies = list(rotation(workload, measure.cache_bytes(device), MOST_COPIES))

    steps: dict[str, list[Step]] = {}
    problems: dict[str, str] = {}
    for provider in PROVIDERS:
        progress.at(f"{spec}: checking {provider.name}")
        try:
            steps[provider.name] = provider.prepare(copies)
            wrong = check.problem(workload, truth, *steps[provider.name][0]())
        except Exception as error:  # whatever a rival lacks here, the others can still be timed
            wrong = f"cannot run here: {_first_line(error)}"
        if wrong is not None:
            steps.pop(provider.name, None)
            problems[provider.name] = wrong
        progress.advance(0.5 / len(PROVIDERS))
    del truth

    progress.at(f"{spec}: timing")
    timings = _timings(steps, conditions, progress)
    rows = []
    for provider in PROVIDERS:
        name = provider.name
        row = _empty_row(workload, name)
        if name in problems:
            rows.append(replace(row, problem=problems[name]))
        else:
            rows.append(_filled(row, timings[name], steps[name][0], conditions))
    return rows


def _timings(
    steps: dict[str, list[Step]], conditions: Conditions, progress: Progress
) -> dict[str, measure.Timing]:
    told = 0.0

    def on_round(share: float) -> None:
        nonlocal told
        progress.advance(0.5 * max(share - told, 0.0))
        told = max(share, told)

    timings = {}
    if steps:
        timings = measure.measure(steps, conditions.device, conditions.seconds, on_round)
    on_round(1.0)
    return timings


def _empty_row(workload: Workload, provider: str) -> Row:
    return Row(
        case=workload.spec.case,
        provider=provider,
        dtype=dtype_name(workload.spec.dtype),
        numel=workload.input.numel(),
        floor_bytes=workload.floor_bytes,
    )


def _filled(row: Row, timing: measure.Timing, step: Step, conditions: Conditions) -> Row:
    gbps = row.floor_bytes / timing.median_ms / 1e6
    return replace(
        row,
        median_ms=timing.median_ms,
        p20_ms=timing.p20_ms,
        p80_ms=timing.p80_ms,
        gbps=gbps,
        percent_of_copy=100 * gbps / conditions.copy_gbps,
        peak_extra_bytes=measure.peak_extra_bytes(step, conditions.device),
        launches=measure.launches(step, conditions.device),
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:PROBLEM_CHARACTERS]
