"""A run of the benchmark times only what is right, keeps to its time, and loses no figure.

The workloads are small here, and torch.compile is left out: what it would compile runs as it is.
"""

import json
import re
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import COMMANDS, check, host, measure, run, sweep
from bench.__main__ import main
from bench.plot import STYLES
from bench.report import RESULTS, Report, Row, describe, print_report, read
from bench.rivals import FUSED, RIVALS, lines_of
from bench.run import Clock, Run
from bench.workloads import CASES, Spec, Workload, build
from tests import support
from tests.support import DEVICE

HERE = torch.device(DEVICE)
NUMEL = 2**14
DENSE = Spec("dense", NUMEL)


@pytest.fixture
def bench_run(tmp_path: Path) -> Run:
    """Return a run that takes as little time as it can."""
    report = Report(describe(HERE), copy_gbps=100.0)
    return Run(HERE, RIVALS, 0.0, Clock(), report, tmp_path / "report.json")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmark's command measure one workload, in little time."""
    monkeypatch.setattr(run, "specs", lambda device, quick: [DENSE])
    monkeypatch.setattr(run, "RIVALS", (RIVALS[1], RIVALS[-1]))
    monkeypatch.setattr(measure, "COPY_SECONDS", 0.0)
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr(host, "SECONDS", 0.0)


def test_what_fails_is_named(bench_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Be it a rival, or a workload that cannot be had; the others are timed."""

    def fails(workload: Workload) -> Any:
        raise NotImplementedError("no such kernel\nsecond line")

    def lies(workload: Workload) -> Any:
        return lambda: (torch.zeros(()), None)

    rivals = {"fails": fails, "lies": lies, FUSED: RIVALS[-1].step}
    bench_run.rivals = [replace(RIVALS[-1], name=name, step=step) for name, step in rivals.items()]
    assert bench_run.finish(lambda: bench_run.fill([Spec("odd", NUMEL), DENSE]), FUSED) == 1
    unheard_of, failed, wrong, right = bench_run.report.rows
    assert unheard_of.problem == "cannot be measured here: ValueError: there is no case 'odd'"
    assert failed.problem == "cannot run here: NotImplementedError: no such kernel"
    assert str(wrong.problem).startswith("wrong loss: 0, should be ")
    assert str(wrong.problem) in capsys.readouterr().out
    assert unheard_of.median_ms is failed.median_ms is wrong.median_ms is None
    assert right.median_ms is not None


def test_rows(bench_run: Run, uncompiled: None) -> None:
    """A rival has all figures, unless it is compiled and that may not fit into the limit.

    The first compilation may take half a minute, and any other one twice the time of the last.
    """
    assert Clock().compile_seconds == 15
    # Seconds of a limit, what the last compilation took, and whether the next one fits.
    for limit, last, fits in [(29, 15, False), (300, 15, True), (29, 1, True), (99, 50, False)]:
        clock = bench_run.clock = Clock(limit)
        clock.compile_seconds = last
        rows: list[Any] = bench_run.rows(DENSE)
        # When one fits, it takes no time, as nothing is compiled here: so the other fits too.
        left_out = [] if fits else ["compile", "compile_grad_and_value"]
        assert [row.rival for row in rows if row.left_out is not None] == left_out
        assert [row.rival for row in rows if row.median_ms is None] == left_out
        assert (clock.compile_seconds < last) == fits
        for row in rows:
            if row.rival not in left_out:
                assert row.gbps == pytest.approx(row.floor_bytes / row.median_ms / 1e6)
                assert row.percent_of_copy == pytest.approx(row.gbps)
                assert row.peak_extra_bytes >= 4 * NUMEL


def test_limit(quick: None, tmp_path: Path) -> None:
    """What does not fit is left out and named in the file; what comes last has time reserved."""
    assert run.LAST_SECONDS == 30
    for limit, fits, has_host_times in ((0, False, False), (25, False, True), (999, True, True)):
        assert main(["--out", str(tmp_path), "--limit", str(limit)]) == 0
        (path,) = tmp_path.iterdir()  # Nothing is drawn.
        report = read(path)
        assert bool(report.host_us) == has_host_times
        assert [text[:11] for text in report.left_out] == ["host times:"] * (not has_host_times)
        reasons = [(row.rival, row.left_out) for row in report.rows if row.median_ms is None]
        assert reasons == [(run.ALL, "it may take 2 s, and 0 s were left")] * (not fits)


def test_an_interrupted_busy_run(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process for each core spins while it measures, and none after it.

    Figures are written as they come: only those of the workload in hand are lost.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(arguments: list[str]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(arguments))
        return started[-1]

    def build_first(spec: Spec, device: torch.device) -> Workload:
        assert [process.poll() for process in started] == [None] * torch.get_num_threads()
        if spec.case == "dense":
            return build(spec, device)
        (written,) = tmp_path.glob("*-busy.json")
        assert {row.case for row in read(written).rows} == {"dense"}
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(run, "build", build_first)
    monkeypatch.setattr(run, "specs", lambda device, quick: [DENSE, Spec("none", NUMEL)])
    assert main(["--busy", "--out", str(tmp_path)]) == run.INTERRUPTED
    (path,) = tmp_path.glob("*.json")
    assert read(path).busy_cores == torch.get_num_threads()
    assert len(list(tmp_path.glob("*-busy*.png"))) == 2
    assert all(process.poll() is not None for process in started)


def test_what_is_written_is_read_again(bench_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """To five digits; and it is told and drawn, with every reason why there is no figure."""
    report, path, operands = bench_run.report, bench_run.path, ("float32", 4, 80)
    report.rows = [
        Row("dense", "compile", *operands, 3.0, 1.0, 3.0, 1.0, 12.0),
        Row("dense", FUSED, *operands, 2.0, 1.0, 3.0, 1.0, 12.0, peak_extra_bytes=16, launches=2),
        Row("dense_graph", "eager_classic", *operands, problem="no memory"),
        Row("none", run.ALL, *operands, left_out="no time"),
    ]
    report.host_us["plain"] = {"fused_us": 10.0, "torch_us": 8.0, "ratio": 1.25}
    report.left_out.append("launches: no time")
    for copy_gbps in (12.345678, 12.346):
        report.copy_gbps = copy_gbps
        report.write(path)
        assert read(path) == replace(report, copy_gbps=12.346)
    print_report(report, FUSED, lines_of(RIVALS))
    told = " ".join(capsys.readouterr().out.split())
    assert " compile 3.000 1.000 3.000 1.50x 0.000 1.000 12% - - " in told
    for reason in ("eager_classic on dense_graph 4 float32: no memory", "launches: no time"):
        assert reason in told
    assert main(["plot", str(path)]) == 0
    assert {path.name for path in path.parent.glob("*.png")} == {"report.png", "report-summary.png"}
    # What is kept of other runs can be read and drawn too.
    others = ("drafter", "host", "train", "tune", "torchvision", "sweep")
    kept = [path for path in RESULTS.glob("*.json") if not path.name.startswith(others)]
    assert {row.rival for path in kept for row in read(path).rows} - {run.ALL} <= {*STYLES}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has it; it says of workloads and rivals what the benchmark's README says."""
    for name in (*COMMANDS, ""):
        with pytest.raises(SystemExit, match="0"):
            main([*name.split(), "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert f"python -m bench {name}".strip() in told
    lines = CASES | {rival.name: rival.what for rival in RIVALS}
    assert all(f" {name} {line} " in told for name, line in lines.items())
    section = (support.ROOT / "bench" / "README.md").read_text().split("## Workloads and rivals")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert rows == [*lines.items()]


@support.needs_triton
def test_host_times() -> None:
    """On any machine, in a process of its own, in which a driver stands in for a GPU."""
    script = "from bench import host; host.SECONDS = 0; host.main(['--json'])"
    times = json.loads(support.run_python("-c", script))
    assert [*times] == ["plain", "tensor_beta", "weighted", "masked", "none"]
    for call, own in times.items():
        assert own["ratio"] == pytest.approx(own["fused_us"] / own["torch_us"], abs=1e-3)
        assert own["first_ms"] > 0
        assert ("composition_us" in own) == (call in ("weighted", "masked"))


@support.needs_no_gpu
@support.needs_interpreter
def test_sweep(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each constant decides what is launched, of its own rival alone, and each answer is right."""
    from triton.runtime.interpreter import GridExecutor

    launched: dict[str, set[Any]] = defaultdict(set)
    original = GridExecutor.__call__

    def spied(self: Any, *arguments: Any, **options: Any) -> Any:
        launched[rival.name].add((self.fn, self.grid, arguments[-1], options["num_warps"]))
        return original(self, *arguments, **options)

    specs = [Spec("dense", 12_000), Spec("dense", 12_000, torch.bfloat16), Spec("row_mask", 4096)]
    workloads = [build(spec, HERE) for spec in specs]
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", spied)
        for rival in sweep.rivals(HERE):
            for own in workloads:
                assert check.problem(own, check.expected(own), *rival.step(own)()) is None
    assert len(launched) == len(sweep.VARIED)
    same = [name for name, found in launched.items() if found == launched[sweep.AS_BUILT]]
    # (What is below that size already is multiplied as it is.)
    assert same == [sweep.AS_BUILT, f"MULTIPLY_BELOW {1 << 30}"]
    # The command does the same.
    monkeypatch.setattr(sweep, "specs", lambda device: [Spec("dense", 64)])
    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    assert main(["sweep", "--out", str(tmp_path)]) == 0
    assert [found.rival for found in read(tmp_path / "sweep-cpu.json").rows] == [*launched]


@support.needs_gpu
def test_on_a_gpu(bench_run: Run, unpoisoned: None) -> None:
    """With graphs, memory, launches, and compiled rivals; a sweep, with workspaces of its own."""
    cases = ("dense", "row_mask")
    listed = [Spec(case, 2**17, graph=graph) for case in cases for graph in (False, True)]
    bench_run.fill(listed[:2])
    bench_run.fill_launches(listed[:2])
    rows: Any = [row for row in bench_run.report.rows if row.case == "dense"]
    fused, composition = rows[-1], rows[1]
    assert fused.launches == 2
    assert composition.launches > 4
    assert 2**19 <= fused.peak_extra_bytes < 2**19 + 2**20
    bench_run.rivals = sweep.rivals(HERE)
    bench_run.fill(listed)
    for row in bench_run.report.rows:
        assert row.problem is row.left_out is None
        assert row.median_ms
