"""A run: every workload built, its providers checked, the right ones timed, rows made."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from bench import check, measure
from bench.cases import Spec, Workload, build, dtype_name, rotation
from bench.providers import PROVIDERS, Provider, Step, forget_compiled
from bench.report import Report, Row

SECONDS, QUICK_SECONDS = 2.0, 0.5  # of timing, for all providers of a workload together
MOST_COPIES = 64  # of a workload on a GPU; where more would fit, launching is the limit anyway
PROBLEM_CHARACTERS = 300
ALL = "all"  # the provider of a row that stands for a whole workload
COUNT_SECONDS = 1.0  # what a provider's launches may take to count
FIRST_COMPILE_SECONDS = 30.0  # what torch.compile may take before it has shown what it takes


class Clock:
    """How much time a run has left, and whether what comes next still fits into it.

    A run without a limit has no end. `reserved` seconds are kept for what comes last. torch.compile
    cannot be stopped half-way, so it starts only where twice the time that it took last is left.
    """

    def __init__(self, limit: float = inf, reserved: float = 0.0) -> None:
        self.reserved = reserved
        self._end = time.monotonic() + limit
        self._compile_seconds = FIRST_COMPILE_SECONDS / 2

    def left(self) -> float:
        """Return the seconds left, none where the end has come."""
        return max(self._end - self.reserved - time.monotonic(), 0.0)

    def why_not(self, seconds: float, compiles: bool = False) -> str | None:
        """Say why what takes so many seconds, and perhaps a compilation, is left out, or None."""
        needed = seconds + (2 * self._compile_seconds if compiles else 0.0)
        left = self.left()
        return None if left >= needed else f"it may take {needed:.0f} s, and {left:.0f} s were left"

    def compiled(self, seconds: float) -> None:
        """Tell how long the last compilation took."""
        self._compile_seconds = seconds


@dataclass(frozen=True)
class Conditions:
    """What holds for a whole run: the device, its copy bandwidth, seconds of timing a workload."""

    device: torch.device
    copy_gbps: float
    seconds: float
    clock: Clock


@dataclass(frozen=True)
class Progress:
    """Where a run tells what it is doing and how far it is, in shares of one workload."""

    at: Callable[[str], None]
    advance: Callable[[float], None]


def run(specs: list[Spec], conditions: Conditions, progress: Progress) -> Iterator[list[Row]]:
    """Yield the rows of one workload after the other, so that an interruption loses only one."""
    for spec in specs:
        whole = Row(spec.name, ALL, dtype_name(spec.dtype), spec.numel, floor_bytes=0)
        left_out = conditions.clock.why_not(conditions.seconds)
        if left_out is not None:
            yield [replace(whole, left_out=left_out)]
            continue
        try:
            yield _workload_rows(spec, conditions, progress)
        except Exception as error:  # no memory for the operands, or a package is missing
            yield [replace(whole, problem=f"cannot be measured here: {first_line(error)}")]


def count_launches(report: Report, specs: list[Spec], conditions: Conditions) -> Iterator[None]:
    """Fill the launches in for the first of `specs` of each case and type; yield after each.

    It is done after all timing: a profiler may leave launches slower behind it.
    """
    firsts: dict[tuple[str, torch.dtype], Spec] = {}
    for spec in specs:
        firsts.setdefault((spec.name, spec.dtype), spec)
    for spec in firsts.values():
        timed = {row.provider: row for row in report.rows if _is_of(row, spec) and row.median_ms}
        if spec.graph or not timed:
            continue
        forget_compiled()
        workload = build(spec, conditions.device)
        for provider in PROVIDERS:
            if provider.name not in timed:
                continue
            row = timed[provider.name]
            left_out = conditions.clock.why_not(COUNT_SECONDS, provider.compiles)
            if left_out is None:
                try:
                    (step,) = provider.prepare([workload])
                    step()  # compiles what compiles
                    launches = measure.launches(step, conditions.device)
                    report.rows[report.rows.index(row)] = replace(row, launches=launches)
                except Exception as error:  # the profiler's, where it does not work
                    left_out = first_line(error)
            if left_out is not None:
                report.left_out.append(f"launches of {provider.name} on {spec}: {left_out}")
        yield


def _is_of(row: Row, spec: Spec) -> bool:
    return (row.case, row.dtype, row.numel) == (spec.name, dtype_name(spec.dtype), spec.numel)


def _workload_rows(spec: Spec, conditions: Conditions, progress: Progress) -> list[Row]:
    device, clock = conditions.device, conditions.clock
    forget_compiled()
    progress.at(f"{spec}: operands")
    workload = build(spec, device)
    truth = check.expected(workload)
    copies = list(rotation(workload, measure.cache_bytes(device), MOST_COPIES))
    rivals = [provider for provider in PROVIDERS if provider.is_rival_of(workload)]

    steps: dict[str, list[Step]] = {}
    rows = {rival.name: _empty_row(workload, rival.name) for rival in rivals}
    for rival in rivals:
        progress.at(f"{spec}: checking {rival.name}")
        row = rows[rival.name]
        left_out = clock.why_not(conditions.seconds, rival.compiles)
        if left_out is None:
            began = time.monotonic()
            try:
                steps[rival.name] = _steps(rival, copies, conditions)
                wrong = check.problem(workload, truth, *steps[rival.name][0]())
            except Exception as error:  # whatever a rival lacks here, the others can still be timed
                wrong = f"cannot run here: {first_line(error)}"
            if rival.compiles:
                clock.compiled(time.monotonic() - began)
            if wrong is not None:
                steps.pop(rival.name, None)
                rows[rival.name] = replace(row, problem=wrong)
        else:
            rows[rival.name] = replace(row, left_out=left_out)
        progress.advance(0.5 / len(rivals))
    del truth

    progress.at(f"{spec}: timing")
    timings = _timings(steps, conditions, progress)
    for name, timing in timings.items():
        rows[name] = _filled(rows[name], timing, spec, steps[name][0], conditions)
    return list(rows.values())


def _steps(rival: Provider, copies: Sequence[Workload], conditions: Conditions) -> list[Step]:
    steps = rival.prepare(copies)
    if not copies[0].spec.graph:
        return steps
    return [measure.replayed(step, conditions.device) for step in steps]


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
        case=workload.spec.name,
        provider=provider,
        dtype=dtype_name(workload.spec.dtype),
        numel=workload.input.numel(),
        floor_bytes=workload.floor_bytes,
    )


def _filled(
    row: Row, timing: measure.Timing, spec: Spec, step: Step, conditions: Conditions
) -> Row:
    gbps = row.floor_bytes / timing.median_ms / 1e6
    # What a graph needs was taken when it was captured.
    peak = None if spec.graph else measure.peak_extra_bytes(step, conditions.device)
    return replace(
        row,
        median_ms=timing.median_ms,
        p20_ms=timing.p20_ms,
        p80_ms=timing.p80_ms,
        gbps=gbps,
        percent_of_copy=100 * gbps / conditions.copy_gbps,
        peak_extra_bytes=peak,
    )


def first_line(error: Exception) -> str:
    """Return an exception's kind and the beginning of what it says."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:PROBLEM_CHARACTERS]
