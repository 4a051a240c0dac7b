"""A run of the benchmark times only what is right, keeps to its time, and loses no figure.

The workloads are small here, and torch.compile is left out: what it would compile runs as it is.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import COMMANDS, host, measure, run, sweep
from bench.__main__ import main as bench_main
from bench.plot import STYLES, write_plots
from bench.plot import main as plot
from bench.report import Report, Row, describe, number, print_report, read
from bench.rivals import FUSED, RIVALS, lines_of
from bench.run import Clock, Run
from bench.workloads import CASES, GRAPH, Spec, Workload, build, specs
from tests.conftest import HAS_TRITON, on_interpreter
from tests.test_rivals import CASES as MEASURED
from tests.test_rivals import NUMEL, numel_of

ROOT = Path(__file__).parent.parent
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")


@pytest.fixture
def bench_run(device: str, tmp_path: Path) -> Run:
    """Return a run that takes as little time as it can."""
    where = torch.device(device)
    report = Report(describe(where), copy_gbps=100.0)
    return Run(where, RIVALS, 0.0, Clock(), report, tmp_path / "report.json")


def test_rows(bench_run: Run, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rival of each workload is right and has its figures; none is compiled as dynamic."""
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    bench_run.fill([Spec(case, numel_of(case)) for case in MEASURED])
    assert len(resets) == len(MEASURED)
    assert list(dict.fromkeys(row.case for row in bench_run.report.rows)) == list(MEASURED)
    for row in bench_run.report.rows:
        assert (row.problem, row.left_out) == (None, None)
        assert row.median_ms is not None
        assert row.gbps == pytest.approx(row.floor_bytes / row.median_ms / 1e6)
        assert row.percent_of_copy == pytest.approx(row.gbps)
        assert row.peak_extra_bytes is not None


@pytest.mark.parametrize(
    ("last", "limit", "fits"),
    [(None, 29.0, False), (None, 300.0, True), (1.0, 29.0, True), (200.0, 300.0, False)],
)
def test_compilation_that_does_not_fit_is_left_out(
    last: float | None, limit: float, fits: bool, bench_run: Run, uncompiled: None
) -> None:
    """The first may take half a minute, and any other one twice the time of the last."""
    clock = bench_run.clock = Clock(limit)
    if last is not None:
        clock.compile_seconds = last
    rows = bench_run.rows(Spec("dense", NUMEL))
    compiled = [row for row in rows if row.rival in ("compile", "compile_grad_and_value")]
    assert len(compiled) == 2
    # When one fits, it takes next to no time, as nothing is compiled here: so the other fits too.
    assert all((row.left_out is None) == fits for row in compiled)
    # The clock was told how little that was.
    assert (clock.why_not(limit - 5, compiles=True) is None) == fits
    for row in rows:
        assert (row.median_ms is None) == (row.left_out is not None)


def test_a_run_without_time_says_so(bench_run: Run) -> None:
    bench_run.clock, bench_run.seconds = Clock(5.0), 1.0
    bench_run.clock.reserved = 5.0
    for case in ("dense", "no_weights"):
        (row,) = bench_run.rows(Spec(case, NUMEL))
        assert (row.case, row.rival, row.numel) == (case, run.ALL, NUMEL)
        assert row.left_out == "it may take 1 s, and 0 s were left"
    bench_run.clock.reserved = 0.0
    assert bench_run.clock.why_not(1.0) is None


def test_a_rival_that_fails_is_reported(bench_run: Run) -> None:
    """It has the reason in its row, and the others are timed."""

    def fails(workload: Workload) -> Any:
        raise NotImplementedError("no such kernel\nsecond line")

    def lies(workload: Workload) -> Any:
        return lambda: (torch.zeros(()), None)

    bench_run.rivals = (
        replace(RIVALS[0], name="fails", step=fails),
        replace(RIVALS[0], name="lies", step=lies),
        RIVALS[-1],
    )
    failed, wrong, fused = bench_run.rows(Spec("dense", NUMEL))
    assert failed.problem == "cannot run here: NotImplementedError: no such kernel"
    assert wrong.problem is not None
    assert wrong.problem.startswith("wrong loss: 0, should be ")
    assert failed.median_ms is wrong.median_ms is None
    assert fused.median_ms is not None


def test_a_workload_that_does_not_fit_into_memory(
    bench_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_only_small(spec: Spec, device: torch.device) -> Workload:
        if spec.numel > NUMEL:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(spec, device)

    monkeypatch.setattr(run, "build", build_only_small)
    bench_run.rivals = RIVALS[-1:]
    bench_run.fill([Spec("dense", 2 * NUMEL), Spec("dense", NUMEL)])
    large, small = bench_run.report.rows
    assert large.problem == "cannot be measured here: OutOfMemoryError: CUDA out of memory"
    assert small.median_ms is not None


def test_launches_are_counted_once_a_case(bench_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first size, of every rival that was timed; what is not counted is named."""
    counted: list[object] = []

    def launches(action: Callable[[], tuple[Tensor, Tensor]]) -> int:
        counted.append(action()[1].numel())
        return 7

    monkeypatch.setattr(measure, "launches", launches)
    bench_run.rivals = (RIVALS[1], RIVALS[-1])
    listed = [Spec("dense", NUMEL), Spec("dense", 64), Spec("none", 64)]
    bench_run.fill(listed)
    bench_run.fill_launches(listed)
    report = bench_run.report
    assert counted == [NUMEL, NUMEL, 64, 64]
    assert [row.launches for row in report.rows] == [7, 7, None, None, 7, 7]
    assert report.left_out == []
    bench_run.clock = Clock(0.0)
    bench_run.fill_launches(listed[:1])
    assert [text.partition(":")[0] for text in report.left_out] == [
        f"launches of {name} on dense {NUMEL:,} float32" for name in ("eager_composition", FUSED)
    ]


def test_report_round_trip(tmp_path: Path) -> None:
    """What was written is read again, to five digits; a row is a line of the file."""
    report = Report(describe(torch.device("cpu")), copy_gbps=12.345678)
    report.rows = [
        Row("dense", FUSED, "float32", 4, 80, median_ms=0.5, launches=2),
        Row("dense", "compile", "float32", 4, 80, left_out="no time"),
    ]
    report.host_us["plain"] = {"fused_us": 10.0, "torch_us": 8.0, "ratio": 1.25}
    report.left_out.append("launches: no time")
    path = tmp_path / "new" / "report.json"
    for _ in range(2):
        report.write(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert read(path) == replace(report, copy_gbps=12.346)
    assert sum("rival" in line for line in path.read_text().splitlines()) == len(report.rows)


def test_results_can_be_drawn() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        others = ("drafter", "host", "train", "tune", "torchvision", "sweep")
        if not path.name.startswith(others):
            assert {row.rival for row in read(path).rows} - {run.ALL} <= set(STYLES)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """They say how many times as fast one rival is, and why another one has no figures."""
    timed: Any = {"p20_ms": 1.0, "p80_ms": 3.0, "gbps": 1.0, "percent_of_copy": 12.0}
    report = Report(describe(torch.device("cpu")), copy_gbps=10.0)
    report.rows = [
        Row("dense", "compile", "float32", 4, 80, median_ms=3.0, **timed),
        Row("dense", "eager_classic", "float32", 4, 80, problem="no memory"),
        Row("dense", FUSED, "float32", 4, 80, median_ms=2.0, **timed),
    ]
    print_report(report, compared=FUSED, rivals={})
    table = capsys.readouterr().out
    (compiled,) = (line for line in table.splitlines() if "compile" in line)
    figures = "3.000, 1.000, 3.000, 1.50x, 0.000, 1.000, 12%, -, -"
    assert compiled.split()[2:] == figures.split(", ")
    assert "eager_classic on dense 4 float32: no memory" in table
    assert [number(value) for value in (None, 4e-6, 0.51239, 117.84, 12345.6)] == [
        *("-", "0.000", "0.512", "117.8", "12,346"),
    ]


@pytest.mark.parametrize("case", ["dense", "dense_graph"])
def test_below_the_tables_stands_what_occurs_in_them(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(describe(torch.device("cpu")), copy_gbps=10.0)
    report.rows = [Row(case, name, "float32", 4, 80) for name in ("compile", FUSED)]
    print_report(report, compared=FUSED, rivals=lines_of(RIVALS))
    told = _squeezed(capsys.readouterr().out)
    lines = CASES | lines_of(RIVALS)
    found = {name for name, line in lines.items() if f"{name} {line}" in told}
    assert found == {"dense", "compile", FUSED} | ({GRAPH} if case.endswith(GRAPH) else set())


def test_help_says_what_workloads_and_rivals_are(capsys: pytest.CaptureFixture[str]) -> None:
    """And each of those that are measured has its line."""
    with pytest.raises(SystemExit):
        run.main(["--help"])
    told = _squeezed(capsys.readouterr().out)
    lines = CASES | lines_of(RIVALS)
    assert all(f" {name} {line} " in told for name, line in lines.items())
    for device in ("cpu", "cuda"):
        listed = specs(torch.device(device), quick=False)
        assert {part for spec in listed for part in spec.name.partition(GRAPH) if part} <= {*CASES}
    assert {*CASES} == {*MEASURED, "rpn", GRAPH}
    assert {rival.name for rival in RIVALS} == {*lines_of(RIVALS)}


def test_the_readme_says_what_workloads_and_rivals_are() -> None:
    """In the words of the code."""
    section = (ROOT / "bench" / "README.md").read_text().partition("## Workloads and rivals")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert rows == [*CASES.items(), *lines_of(RIVALS).items()]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def test_pictures_of_a_report_with_gaps(tmp_path: Path) -> None:
    """What failed, was left out, or has no memory of its own leaves no picture undrawn."""

    def row(case: str, rival: str, **figures: Any) -> Row:
        return Row(case, rival, "float32", 4, 80, **figures)

    report = Report(describe(torch.device("cpu")), copy_gbps=10.0)
    timed = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "gbps": 1.0, "percent_of_copy": 10.0}
    report.rows = [
        row("dense", "compile", problem="no compiler"),
        row("dense", FUSED, **timed, peak_extra_bytes=16),
        row("rpn_graph", FUSED, **timed),
        row("none", FUSED, left_out="no time"),
        row("drafter", run.ALL, left_out="no time"),
    ]
    report.write(tmp_path / "report.json")
    assert plot([str(tmp_path / "report.json")]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"report.png", "report-summary.png"}


def test_only_several_sizes_are_drawn_over_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured at one size has its bars alone, and its title over them."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.append(self))
    report = Report(describe(torch.device("cpu")), copy_gbps=10.0)
    timed = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "gbps": 1.0, "percent_of_copy": 10.0}
    report.rows = [
        Row(case, FUSED, "float32", 4, 80, **timed, peak_extra_bytes=16)  # type: ignore[arg-type]
        for case in ("rpn", "none")
    ]
    write_plots(report, tmp_path / "report.json")
    report.rows.append(replace(report.rows[-1], numel=8))
    write_plots(report, tmp_path / "report.json")
    ones, mixed = found
    assert [axes.get_xlabel() for axes in ones.axes] == 4 * ["4 elements"]
    over_sizes, bars = 2 * ["elements"], 2 * ["4 elements", "8 elements"]
    assert [axes.get_xlabel() for axes in mixed.axes] == over_sizes + bars
    assert [axes.get_title() for axes in ones.axes] == ["rpn\nfloat32", "none\nfloat32", "", ""]
    titles = ["none\nfloat32", "", "rpn\nfloat32", "", "", ""]
    assert [axes.get_title() for axes in mixed.axes] == titles
    assert all(axes.get_ylabel() for axes in mixed.axes[:3])
    for figure in found:
        (legend,) = figure.legends
        rival, floor = (text.get_text() for text in legend.get_texts())
        assert rival == FUSED
        assert "can beat it" in floor, "a bar below the floor needs a reason"


@pytest.mark.parametrize(("threads", "said"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_threads_of_a_cpu(threads: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe(torch.device("cpu")).device.endswith(said)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmark's command quick."""
    monkeypatch.setattr(run, "RIVALS", (RIVALS[1], RIVALS[-1]))
    monkeypatch.setattr(measure, "COPY_SECONDS", 0.0)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is there, and says what it is for."""
    with pytest.raises(SystemExit) as ended:
        bench_main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0
    assert f"python -m bench {command}".strip() in capsys.readouterr().out


def test_a_problem_is_the_exit_status(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lies(workload: Workload) -> Any:
        return lambda: (torch.zeros(()), None)

    monkeypatch.setattr(run, "specs", lambda device, quick: [Spec("dense", NUMEL)])
    monkeypatch.setattr(run, "RIVALS", (replace(RIVALS[0], step=lies), RIVALS[-1]))
    assert run.main(["--out", str(tmp_path)]) == 1


def test_figures_are_written_as_they_come(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption loses the workload in hand, and neither the file nor the pictures."""
    listed = [Spec("dense", NUMEL), Spec("no_weights", NUMEL)]

    def interrupted(spec: Spec, device: torch.device) -> Workload:
        if spec is listed[0]:
            return build(spec, device)
        (written,) = tmp_path.glob("*.json")
        assert {row.case for row in read(written).rows} == {"dense"}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "build", interrupted)
    monkeypatch.setattr(run, "specs", lambda device, quick: listed)
    assert run.main(["--out", str(tmp_path)]) == run.INTERRUPTED
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_limit(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is left out and named in the file; nothing is drawn of what does."""
    assert run.main(["--out", str(tmp_path), "--limit", "0"]) == 0
    (path,) = tmp_path.iterdir()
    report = read(path)
    assert len(report.rows) > 10
    assert all(row.left_out is not None for row in report.rows)
    assert report.left_out[0].startswith("host times: ")
    # What comes last has its time reserved.
    limit = str(run.LAST_SECONDS - 5)
    assert run.main(["--out", str(tmp_path), "--limit", limit]) == 0
    assert all(row.left_out is not None for row in read(path).rows)
    assert read(path).host_us
    monkeypatch.setattr(run, "specs", lambda device, quick: [Spec("dense", NUMEL)])
    assert run.main(["--out", str(tmp_path), "--limit", "1000"]) == 0
    assert list(tmp_path.iterdir()) == [path]
    assert all(row.median_ms is not None for row in read(path).rows)


def test_a_busy_run(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each core spins while it measures, and none after it."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def kept(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = popen(command, **options)
        if not options:  # PyTorch starts processes too.
            started.append(process)
        return process

    def while_busy(spec: Spec, device: torch.device) -> Workload:
        assert len(started) == torch.get_num_threads()
        assert all(process.poll() is None for process in started)
        return build(spec, device)

    monkeypatch.setattr(subprocess, "Popen", kept)
    monkeypatch.setattr(run, "build", while_busy)
    monkeypatch.setattr(run, "specs", lambda device, quick: [Spec("dense", NUMEL)])
    assert run.main(["--busy", "--limit", "1000", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-busy.json")
    assert read(path).busy_cores == torch.get_num_threads()
    assert all(process.poll() is not None for process in started)


def _measured_once(steps: dict[Any, list[measure.Action]], *_: Any) -> dict[Any, measure.Timing]:
    for own in steps.values():
        own[0]()
    return {step: measure.Timing(0.25 if step[1] == "torch" else 0.5, 0.0, 1.0) for step in steps}


def test_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """In microseconds, of calls that can be made."""
    monkeypatch.setattr(host, "measure", _measured_once)
    found = host.host_us(torch.device("cpu"))
    bare = {"fused_us": 500.0, "torch_us": 250.0, "ratio": 2.0}
    composed = {**bare, "composition_us": 500.0}
    assert found == {
        **{"plain": bare, "tensor_beta": bare, "weighted": composed, "masked": composed},
        "none": bare,
    }


@pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")
@pytest.mark.parametrize("form", [["--json"], []], ids=str)
def test_command_of_the_host_times(form: list[str], tmp_path: Path) -> None:
    """On any machine, in a process of its own, in which a driver stands in for a GPU."""
    script = (
        "import sys; from bench import host; from bench.measure import Timing; "
        "host.measure = lambda steps, *_: "
        "{s: [own[0]() for _ in range(2)] and Timing(1., 1., 1.) for s, own in steps.items()}; "
        f"sys.exit(host.main({form}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if form:
        plain = json.loads(done.stdout)["plain"]
        assert plain.pop("first_ms") > 0
        assert plain == {"fused_us": 1000, "torch_us": 1000, "ratio": 1}
    else:
        assert "weighted" in done.stdout


def test_device_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU with a number becomes the current one; without one, the current one is taken."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def parsed(*arguments: str) -> torch.device:
        device: torch.device = run.parser_of("bench", "").parse_args(arguments).device
        return device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parsed() == parsed("--device", "cpu") == torch.device("cpu")
    for name, told in (("cuda", "no CUDA device"), ("xpu", "not measured"), ("0", "not measured")):
        with pytest.raises(SystemExit):
            parsed("--device", name)
        assert told in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parsed() == parsed("--device", "cuda") == torch.device("cuda")
    assert chosen == []
    assert parsed("--device", "cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


@on_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")
def test_sweep(bench_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each constant decides what is launched, of its own rival alone, and each answer is right."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[Any] = []
    original = GridExecutor.__call__

    def spied(self: Any, *arguments: Any, **options: Any) -> Any:
        launched.append((self.fn.__name__, self.grid, arguments[-1], options["num_warps"]))
        return original(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", spied)
    monkeypatch.setattr(measure, "measure", lambda *_: {})
    by_rival: dict[str, list[Any]] = {}
    specs = [Spec("dense", 12_000), Spec("dense", 12_000, torch.bfloat16), Spec("row_mask", 4096)]
    for rival in sweep.rivals(torch.device("cpu")):
        launched.clear()
        bench_run.rivals = (rival,)
        bench_run.fill(specs)
        by_rival[rival.name] = list(launched)
    assert all(row.problem is row.left_out is None for row in bench_run.report.rows)
    built = by_rival.pop(sweep.AS_BUILT)
    assert len(by_rival) == len(sweep.VARIED) - 1
    same = [name for name, found in by_rival.items() if set(found) == set(built)]
    # (What is below that size already is multiplied as it is.)
    assert same == [f"MULTIPLY_BELOW {1 << 30}"]
    for name in ("TILE", "MOST", "THREADS", "PROGRAMS", "MULTIPLY"):
        assert any(found.startswith(name) for found in by_rival)


@on_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")
def test_command_of_the_sweep(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_smoothl1 import launch

    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    monkeypatch.setattr(sweep, "VARIED", ({}, {"THREADS": 64}))
    monkeypatch.setattr(sweep, "specs", lambda device: [Spec("dense", 64)])
    assert sweep.main(["--out", str(tmp_path)]) == 0
    report = read(tmp_path / "sweep-cpu.json")
    assert [row.rival for row in report.rows] == [sweep.AS_BUILT, "THREADS 64"]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        sweep.main([])


@on_gpu
def test_sweep_on_a_gpu(bench_run: Run) -> None:
    """In graphs too, with a workspace of each rival's own."""
    bench_run.rivals = sweep.rivals(bench_run.device)
    cases = ("dense", "row_mask")
    bench_run.fill([Spec(case, NUMEL, graph=graph) for case in cases for graph in (True, False)])
    assert all(row.problem is row.left_out is None for row in bench_run.report.rows)


@pytest.mark.skipif(os.name == "nt", reason="waits for a machine with bash")
@pytest.mark.parametrize("arguments", [[], ["everything"]])
def test_gpu_script_names_its_stages(arguments: list[str]) -> None:
    result = subprocess.run(
        ["bash", "bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "measure|sweep|check|sanitize" in result.stderr


@on_gpu
def test_rows_of_a_gpu(bench_run: Run, unpoisoned: None) -> None:
    """With graphs, memory, launches, and a compiled rival."""
    listed = [Spec("dense", NUMEL), Spec("dense", NUMEL, graph=True)]
    bench_run.fill(listed)
    report = bench_run.report
    assert all(row.problem is None and row.median_ms for row in report.rows), report.rows
    bench_run.fill_launches(listed)
    found = {row.rival: row for row in report.rows if row.case == "dense"}
    composition, fused = found["eager_composition"], found[FUSED]
    assert fused.launches == 2
    assert composition.launches is not None
    assert composition.launches > 4
    assert fused.peak_extra_bytes is not None
    assert NUMEL * 4 <= fused.peak_extra_bytes < NUMEL * 4 + 2**20
