"""What README, CONTRIBUTING and CHANGELOG say is true: of the code, and of what gets installed."""

import ast
import re
from collections.abc import Iterator
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser
from torch import Tensor, autograd
from torch.testing import assert_close

import fused_smoothl1
from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, ROOT, Loss, boxes, coin, results, values

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


SHAPE = (9, 4, 3, 2)
EPS = torch.finfo(torch.float32).eps
draw = partial(values, dtype=torch.float64)


def ported(a: Tensor, b: Tensor, inside: Tensor, outside: Tensor, sigma: float, dim: Any) -> Tensor:
    """Do what the PyTorch ports of Faster R-CNN do: sum over `dim`, then average what is left."""
    weighted = inside * (a - b)
    near = (weighted.abs() < sigma**-2).detach().double()
    far = weighted.abs() - 0.5 / sigma**2
    return (outside * (near * (sigma * weighted) ** 2 / 2 + (1 - near) * far)).sum(dim).mean()


def mmdetection(a: Tensor, b: Tensor, weight: Tensor, beta: float, factor: Any = None) -> Tensor:
    """Weight, then average; an average factor has an epsilon added, against a division by 0."""
    size = (a - b).abs()
    loss = weight * torch.where(size < beta, size * size / (2 * beta), size - beta / 2)
    return loss.mean() if factor is None else loss.sum().div(factor + EPS)


def detectors() -> Iterator[tuple[str, Loss, Loss]]:
    inside, outside = coin(*SHAPE).double(), draw(*SHAPE).abs()
    ours = partial(smooth_l1_loss, outside_weights=outside, reduction="sum")
    old = partial(ported, inside=inside, outside=outside, sigma=3.0)
    new = partial(ours, inside_weights=inside, sigma=3.0)
    # What is left to average is the batch, as in both calls of Faster R-CNN, or more.
    yield "dim of an RPN", partial(old, dim=(1, 2, 3)), partial(new, reduction="batchmean")
    yield "any dim", partial(old, dim=(1,)), partial(new, normalizer=9 * 3 * 2)
    old, new = partial(mmdetection, weight=outside, beta=1 / 9), partial(ours, beta=1 / 9)
    yield "weight", old, partial(new, reduction="mean")
    factor = torch.tensor(7 + EPS, dtype=torch.float64, device=DEVICE)
    yield "avg_factor", partial(old, factor=7), partial(new, normalizer=factor)


@support.on_both
def test_functions_of_detectors() -> None:
    """Written anew from what they publish, they give what the README's calls for them give."""
    for name, old, new in detectors():
        operands = boxes(SHAPE, grad=2, dtype=torch.float64)
        before, after = (results(loss, operands, upstream=3.0) for loss in (old, new))
        assert_close(after, before, rtol=1e-12, atol=1e-15, msg=partial("{}: {}".format, name))
        assert all(result.any() for result in after), name


def test_what_the_documents_name() -> None:
    """The README's blocks all run, test files exist, and the newest release is this."""
    assert len(BLOCKS) == len(re.findall(r"(```|~~~) *py", README, re.IGNORECASE)) > 10
    named = set(re.findall(r"\btest_\w+\.py", README + CONTRIBUTING))
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
