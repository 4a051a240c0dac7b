"""What README, CONTRIBUTING and CHANGELOG say is true: of the code, and of what gets installed."""

import ast
import re
from importlib.metadata import distributions
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser
from torch import Tensor, autograd
from torch.testing import assert_close

import fused_smoothl1
from tests.support import ROOT

README, CONTRIBUTING, CHANGELOG = (
    (ROOT / f"{name}.md").read_text(encoding="utf-8")
    for name in ("README", "CONTRIBUTING", "CHANGELOG")
)
PACKAGE = Path(fused_smoothl1.__file__).parent
# (As they are, but for comments, and with each import in one line.)
FILES = {path.stem: ast.unparse(ast.parse(path.read_text())) for path in PACKAGE.glob("[!_]*.py")}
# (An egg-info, which setuptools left in older checkouts, has no RECORD.)
WHEELS = [
    found
    for found in distributions(name=PACKAGE.name)
    if found.read_text("RECORD") and Path(str(found.locate_file(PACKAGE.name))) == PACKAGE
]


def run(block: Example) -> None:
    """Run a block of the README statement by statement.

    Each `new` in it must equal the `old` above it, loss and gradients alike.
    """
    names: dict[str, Any] = {"__name__": "readme"}
    pairs = 0
    for statement in ast.parse(pad(block.parsed, block.line)).body:
        exec(compile(ast.Module([statement], []), block.path, "exec"), names)
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "new":
            tensors = [value for value in names.values() if isinstance(value, Tensor)]
            leaves = [tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad]
            losses = names["new"], names["old"]
            assert_close(*losses)
            assert_close(*(autograd.grad(loss.sum(), leaves) for loss in losses))
            pairs += 1
    assert pairs == len(re.findall(r"\bnew = ", block.parsed)), "a pair was not compared"


BLOCKS = [*Document.parse(str(ROOT / "README.md"), CodeBlockParser("python", run))]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_block_of_the_readme(block: Example) -> None:
    block.evaluate()


def test_what_the_documents_name() -> None:
    """The README's blocks all run, tests that it names exist, and the newest release is this."""
    assert len(BLOCKS) == len(re.findall(r"(```|~~~) *py", README, re.IGNORECASE)) > 10
    named = set(re.findall(r"\btest_\w+\.py", README))
    assert len(named) > 10
    assert named <= {path.name for path in (ROOT / "tests").iterdir()}
    dated = re.findall(r"^## \[(.+)\] - \d{4}-\d{2}-\d{2}$", CHANGELOG, re.MULTILINE)
    assert dated[:1] == [fused_smoothl1.__version__]


def test_architecture() -> None:
    """Imports run down CONTRIBUTING's list and are those of its picture.

    PyTorch's private names stand in one file (but for torch._check, which is documented).
    """
    imports = r"from fused_smoothl1 import .*\b{0}\b|fused_smoothl1\.{0}\b"
    arrows = {
        (name, other)
        for name, code in FILES.items()
        for other in FILES
        if re.search(imports.format(other), code)
    }
    order = re.findall(r"^\| `(\w+)\.py`", CONTRIBUTING, re.MULTILINE)
    assert sorted(order) == sorted(FILES)
    assert all(order.index(name) < order.index(other) for name, other in arrows)
    anywhere, drawn = {"problem", "hooks"}, set()
    for line in re.findall(r"^ +(\w+ -->.*)$", CONTRIBUTING, re.MULTILINE):
        for tails, heads in pairwise(line.split(" --> ")):
            drawn |= {*product(tails.split(" & "), heads.split(" & "))}
    assert drawn == {arrow for arrow in arrows if arrow[1] not in anywhere}
    into_them = {name for name, other in arrows if other in anywhere} - anywhere
    assert into_them == FILES.keys() - anywhere - {"module", "kernel", "layout"}
    private = re.compile(r"\btorch(?:\.\w+)*\._(?!check\b)\w+")
    assert [name for name, code in FILES.items() if private.search(code)] == ["hooks"]


@pytest.mark.skipif(not WHEELS, reason="waits for an installed wheel, as .ci/run makes one")
def test_wheel_is_the_package_alone() -> None:
    files = WHEELS[0].files or []
    information = f"{PACKAGE.name}-{fused_smoothl1.__version__}.dist-info"
    assert {path.parts[0] for path in files} == {PACKAGE.name, information}
    assert f"{PACKAGE.name}/py.typed" in map(str, files)
