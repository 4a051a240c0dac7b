"""What a run found can be read again, and is told in tables, in words and in pictures."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from bench import run
from bench.plot import STYLES, write_plots
from bench.plot import main as plot
from bench.report import RESULTS, Report, Row, describe, number, print_report, read
from bench.rivals import FUSED, RIVALS, lines_of
from bench.workloads import CASES, GRAPH, specs
from tests.support import ROOT
from tests.test_rivals import CASES as MEASURED

TIMED: Any = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "gbps": 1.0, "percent_of_copy": 12.0}
LINES = CASES | lines_of(RIVALS)


def _row(case: str, rival: str = FUSED, **figures: Any) -> Row:
    return Row(case, rival, "float32", 4, 80, **figures)


def _report(*rows: Row) -> Report:
    return Report(describe(torch.device("cpu")), copy_gbps=12.345678, rows=list(rows))


def test_round_trip(tmp_path: Path) -> None:
    """What was written is read again, to five digits; a row is a line of the file."""
    report = _report(_row("dense", **TIMED, launches=2), _row("dense", left_out="no time"))
    report.host_us["plain"] = {"fused_us": 10.0, "torch_us": 8.0, "ratio": 1.25}
    report.left_out.append("launches: no time")
    path = tmp_path / "new" / "report.json"
    for _ in range(2):
        report.write(path)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == replace(report, copy_gbps=12.346)
    assert sum("rival" in line for line in path.read_text().splitlines()) == 2


@pytest.mark.parametrize("ending", ["", GRAPH])
def test_tables(
    ending: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say how many times as fast one rival is, and why another one has no figures.

    Below them stands what each workload and rival is that occurs in them.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    case = f"dense{ending}"
    slower = _row(case, "compile", **TIMED | {"median_ms": 3.0})
    failed = _row(case, "eager_classic", problem="no memory")
    print_report(_report(slower, failed, _row(case, **TIMED)), FUSED, lines_of(RIVALS))
    told = " ".join(capsys.readouterr().out.split())
    assert " compile 3.000 1.000 3.000 1.50x 0.000 1.000 12% - - " in told
    assert f"eager_classic on {case} 4 float32: no memory" in told
    assert ", 2 threads torch " in told
    found = {name for name, line in LINES.items() if f"{name} {line}" in told}
    assert found == {"dense", "compile", "eager_classic", FUSED, ending} - {""}
    texts = {None: "-", 4e-6: "0.000", 0.51239: "0.512", 117.84: "117.8", 12345.6: "12,346"}
    assert {value: number(value) for value in texts} == texts


def test_every_workload_and_rival_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """In --help and in the README of the benchmark, in the same words."""
    with pytest.raises(SystemExit):
        run.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} {line} " in told for name, line in LINES.items())
    section = (ROOT / "bench" / "README.md").read_text().partition("## Workloads and rivals")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert rows == [*LINES.items()]
    listed = [spec for kind in ("cpu", "cuda") for spec in specs(torch.device(kind), quick=False)]
    assert {spec.case for spec in listed} == {*MEASURED, "rpn"} == {*CASES} - {GRAPH}
    assert {rival.name for rival in RIVALS} == {*lines_of(RIVALS)}


def test_pictures_of_a_report_with_gaps(tmp_path: Path) -> None:
    """What failed, was left out, or has no memory of its own leaves no picture undrawn."""
    failed, timed = _row("dense", "compile", problem="no compiler"), _row("rpn_graph", **TIMED)
    left_out = [_row("none", left_out="no time"), _row("drafter", run.ALL, left_out="no time")]
    whole = _row("dense", **TIMED, peak_extra_bytes=16)
    path = tmp_path / "report.json"
    _report(failed, whole, timed, *left_out).write(path)
    assert plot([str(path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"report.png", "report-summary.png"}
    # What is kept can be drawn too.
    others = ("drafter", "host", "train", "tune", "torchvision", "sweep")
    kept = [path for path in RESULTS.glob("*.json") if not path.name.startswith(others)]
    assert {row.rival for path in kept for row in read(path).rows} - {run.ALL} <= {*STYLES}


def test_only_several_sizes_are_drawn_over_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured at one size has its bars alone, and its title over them."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    rows = [_row(case, **TIMED, peak_extra_bytes=16) for case in ("rpn", "none")]
    for drawn in (rows, [*rows, replace(rows[1], numel=8)]):
        write_plots(_report(*drawn), Path("report.json"))
    one, several = ([(a.get_xlabel(), a.get_title()) for a in figure.axes] for figure in figures)
    rpn, none, bars = "rpn\nfloat32", "none\nfloat32", [("4 elements", ""), ("8 elements", "")]
    assert one == [("4 elements", rpn), ("4 elements", none), *bars[:1] * 2]
    assert several == [("elements", none), ("elements", ""), ("4 elements", rpn), bars[1], *bars]
    for figure in figures:
        assert figure.axes[0].get_ylabel() == "ms a step"
        rival, floor = (text.get_text() for text in figure.legends[0].get_texts())
        assert rival == FUSED
        assert "can beat it" in floor, "a bar below the floor needs a reason"
