"""Every Python block of the README runs, and what it calls old and new are the same number."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser
from torch import Tensor, autograd
from torch.testing import assert_close

from tests.support import ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGE = """
```python
import torch
a = torch.ones(1, requires_grad=True)
old = 1 * a
new = {new}
old = 2 * a
new = a * 2
```
"""


def run(block: Example) -> None:
    """Run a block in a namespace of its own, and compare each pair of old and new in it.

    Statement by statement, because a README uses the two names again and again.
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


def blocks(page: Path) -> list[Example]:
    return [*Document.parse(str(page), CodeBlockParser("python", run))]


@pytest.mark.parametrize("block", blocks(README), ids=lambda block: f"line {block.line}")
def test_block(block: Example) -> None:
    block.evaluate()


def test_every_block_is_found() -> None:
    fences = re.findall(r"^\W*(?:```|~~~)+ *py", TEXT, re.MULTILINE | re.IGNORECASE)
    assert len(blocks(README)) == len(fences) > 0


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """The loss, the gradient, and an error, which has the page's line number."""
    page = tmp_path / "page.md"
    for new, error in [
        ("a + 1", AssertionError),
        ("a.detach() + 0 * a", AssertionError),
        ("a / (1 // 0)", ZeroDivisionError),
    ]:
        page.write_text(PAGE.format(new=new))
        with pytest.raises(error) as caught:
            blocks(page)[0].evaluate()
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 6)


def test_named_tests_exist() -> None:
    """Those that show what the README says of compatibility, and of the rest."""
    named = set(re.findall(r"\btest_\w+\.py", TEXT))
    assert len(named) > 10
    assert named <= {path.name for path in Path(__file__).parent.iterdir()}
