"""A run of the benchmark times only what is right, keeps to its time, and loses no figure.

The workloads are small here, and torch.compile is left out: what it would compile runs as it is.
"""

import json
import os
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import COMMANDS, host, measure, run, sweep
from bench.__main__ import main
from bench.report import Report, describe, read
from bench.rivals import FUSED, RIVALS
from bench.run import Clock, Run
from bench.workloads import Spec, Workload, build
from tests import support
from tests.support import DEVICE
from tests.test_rivals import NUMEL, numel_of

HERE = torch.device(DEVICE)
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


def test_rows(bench_run: Run, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rival of each workload is right and has its figures; none is compiled as dynamic."""
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    cases = ["dense", "row_mask", "kernelbench"]
    bench_run.fill([Spec(case, numel_of(case)) for case in cases])
    rows: list[Any] = bench_run.report.rows
    assert len(resets) == len(cases)
    assert list(dict.fromkeys(row.case for row in rows)) == cases
    for row in rows:
        assert row.problem is row.left_out is None
        assert row.gbps == pytest.approx(row.floor_bytes / row.median_ms / 1e6)
        assert row.percent_of_copy == pytest.approx(row.gbps)
        assert row.peak_extra_bytes is not None


def test_compilation_that_does_not_fit_is_left_out(bench_run: Run, uncompiled: None) -> None:
    """The first may take half a minute, and any other one twice the time of the last."""
    assert Clock().compile_seconds == 15
    # Seconds of a limit, what the last compilation took, and whether the next one fits.
    for limit, last, fits in [(29, 15, False), (300, 15, True), (29, 1, True), (99, 50, False)]:
        clock = bench_run.clock = Clock(limit)
        clock.compile_seconds = last
        rows = bench_run.rows(DENSE)
        # When one fits, it takes no time, as nothing is compiled here: so the other fits too.
        left_out = [] if fits else ["compile", "compile_grad_and_value"]
        assert [row.rival for row in rows if row.left_out is not None] == left_out
        assert [row.rival for row in rows if row.median_ms is None] == left_out
        # The clock was told how little that was.
        assert (clock.why_not(limit / 2, compiles=True) is None) == fits


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


def test_launches_are_counted_once_a_case(bench_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first size, of every rival that was timed; what is not counted is named."""
    monkeypatch.setattr(measure, "launches", lambda step: step()[1].numel())
    bench_run.rivals = (RIVALS[1], RIVALS[-1])
    listed = [DENSE, Spec("dense", 64), Spec("none", 64)]
    bench_run.fill(listed)
    bench_run.fill_launches(listed)
    report = bench_run.report
    assert [row.launches for row in report.rows] == [NUMEL, NUMEL, None, None, 64, 64]
    assert report.left_out == []
    bench_run.clock = Clock(0.0)
    bench_run.fill_launches([DENSE])
    named = [f"launches of {rival.name} on {DENSE}" for rival in bench_run.rivals]
    assert [text.partition(":")[0] for text in report.left_out] == named


def test_limit(quick: None, tmp_path: Path) -> None:
    """What does not fit is left out and named in the file; what comes last has time reserved."""
    last = run.LAST_SECONDS
    for limit, fits, has_host_times in [
        (0, False, False),
        (last - 5, False, True),
        (999, True, True),
    ]:
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

    Figures are written as they come: lost is the workload in hand, and neither file nor picture.
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


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is there, and says what it is for."""
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    assert f"python -m bench {name}".strip() in capsys.readouterr().out


def test_device_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU with a number becomes the current one; without one, the current one is taken."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    refused = {"cuda": "no CUDA device", "xpu": "not measured", "0": "not measured"}
    for best in ("cpu", "cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=best: found == "cuda")
        parser = run.parser_of("bench", "")
        for given in ([], ["--device", best]):
            assert parser.parse_args(given).device == torch.device(best)
        for name in {*refused} - {best}:
            with pytest.raises(SystemExit):
                parser.parse_args(["--device", name])
            assert refused[name] in capsys.readouterr().err
    assert chosen == []
    assert [parser.parse_args(["--device", "cuda:1"]).device] == chosen == [torch.device("cuda:1")]


@support.needs_triton
def test_host_times() -> None:
    """On any machine, in a process of its own, in which a driver stands in for a GPU."""
    script = (
        "from bench import host; from bench.measure import Timing; "
        "host.measure = lambda steps, *_: {key: [own[0]() for _ in range(2)] and "
        "Timing(0.25 if key[1] == 'torch' else 0.5, 0., 1.) for key, own in steps.items()}; "
        "host.main([]); host.main(['--json'])"
    )
    done = support.run_python("-c", script)
    assert done.returncode == 0, done.stderr
    table, brace, plain = done.stdout.partition("{")
    times = json.loads(brace + plain)
    assert all(call in table and own.pop("first_ms") > 0 for call, own in times.items())
    bare = {"fused_us": 500, "torch_us": 250, "ratio": 2}
    weighted = {**bare, "composition_us": 500}
    kinds = {
        "plain": bare,
        "tensor_beta": bare,
        "weighted": weighted,
        "masked": weighted,
        "none": bare,
    }
    assert times == kinds


@support.needs_no_gpu
@support.needs_interpreter
def test_sweep(bench_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each constant decides what is launched, of its own rival alone, and each answer is right."""
    from triton.runtime.interpreter import GridExecutor

    launched: dict[str, set[Any]] = defaultdict(set)
    original = GridExecutor.__call__

    def spied(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = (self.fn.__name__, self.grid, arguments[-1], options["num_warps"])
        launched[bench_run.rivals[0].name].add(kernel)
        return original(self, *arguments, **options)

    def timed(steps: Any, *_: Any) -> Any:
        return dict.fromkeys(steps, measure.Timing(1.0, 1.0, 1.0))

    monkeypatch.setattr(GridExecutor, "__call__", spied)
    monkeypatch.setattr(measure, "measure", timed)
    specs = [Spec("dense", 12_000), Spec("dense", 12_000, torch.bfloat16), Spec("row_mask", 4096)]
    for rival in sweep.rivals(HERE):
        bench_run.rivals = (rival,)
        bench_run.fill(specs)
    assert all(row.problem is row.left_out is None for row in bench_run.report.rows)
    assert len(launched) == len(sweep.VARIED)
    same = [name for name, found in launched.items() if found == launched[sweep.AS_BUILT]]
    # (What is below that size already is multiplied as it is.)
    assert same == [sweep.AS_BUILT, f"MULTIPLY_BELOW {1 << 30}"]
    assert len({name for constants in sweep.VARIED for name in constants}) == 5
    # The command does the same.
    monkeypatch.setattr(sweep, "specs", lambda device: [Spec("dense", 64)])
    assert main(["sweep", "--out", str(tmp_path)]) == 0
    assert [row.rival for row in read(tmp_path / "sweep-cpu.json").rows] == [*launched]
    monkeypatch.setattr("fused_smoothl1.launch.INTERPRETED", False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        main(["sweep"])


@support.needs_gpu
def test_on_a_gpu(bench_run: Run, unpoisoned: None) -> None:
    """With graphs, memory, launches, and compiled rivals; a sweep, with workspaces of its own."""
    listed = [
        Spec(case, NUMEL, graph=graph) for case in ("dense", "row_mask") for graph in (False, True)
    ]
    bench_run.fill(listed[:2])
    bench_run.fill_launches(listed[:2])
    found: dict[str, Any] = {row.rival: row for row in bench_run.report.rows if row.case == "dense"}
    assert found[FUSED].launches == 2
    assert found["eager_composition"].launches > 4
    assert NUMEL * 4 <= found[FUSED].peak_extra_bytes < NUMEL * 4 + 2**20
    bench_run.rivals = sweep.rivals(HERE)
    bench_run.fill(listed)
    for row in bench_run.report.rows:
        assert row.problem is row.left_out is None
        assert row.median_ms


@pytest.mark.skipif(os.name == "nt", reason="waits for a machine with bash")
@pytest.mark.parametrize("stage", ["", "everything"])
def test_gpu_script_names_its_stages(stage: str) -> None:
    script = f"cd '{support.ROOT}' && bash bench/gpu.sh {stage}"
    status, told = subprocess.getstatusoutput(script)
    assert status == 2
    assert "measure|sweep|check|sanitize" in told
