"""Every Python block of the README runs, and what it calls old and new are the same number."""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
# An opening fence may be indented and longer than three, and may name more than the language.
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
PYTHON = ("python", "py", "python3")


class Block(NamedTuple):
    """Code, and the line of the README on which it starts, from 1."""

    line: int
    code: str

    def __str__(self) -> str:
        return f"line {self.line}"


def python_blocks(text: str) -> list[Block]:
    """Return the Python blocks of a Markdown text; one that never ends is an error."""
    blocks: list[Block] = []
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            continue
        body: list[str] = []
        for _, inner in lines:
            closing = FENCE.match(inner)
            if closing and closing["fence"].startswith(opening["fence"]) and not closing["info"]:
                break
            body.append(inner.removeprefix(opening["indent"]))
        else:
            raise ValueError(f"the block that starts on line {number} does not end")
        if opening["info"].strip().partition(" ")[0].lower() in PYTHON:
            blocks.append(Block(number + 1, "\n".join(body)))
    return blocks


BLOCKS = python_blocks(README.read_text(encoding="utf-8"))


def _run(block: Block) -> int:
    """Run a block in a namespace of its own; return how many pairs of old and new agreed.

    Statement by statement, because a README uses the two names again and again. Line numbers in a
    traceback are the README's.
    """
    namespace: dict[str, Any] = {"__name__": "readme"}
    pairs = 0
    for statement in ast.parse(block.code).body:
        ast.increment_lineno(statement, block.line - 1)
        exec(compile(ast.Module([statement], []), str(README), "exec"), namespace)
        names = [getattr(target, "id", "") for target in getattr(statement, "targets", [])]
        if "new" in names:
            _assert_pair(namespace)
            pairs += 1
    return pairs


def _assert_pair(namespace: dict[str, Any]) -> None:
    """Compare the losses, and their gradients for every tensor of the block that requires one."""
    old, new = namespace["old"], namespace["new"]
    torch.testing.assert_close(new, old)
    leaves = [
        value
        for value in namespace.values()
        if isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad
    ]
    if leaves:
        before, after = (torch.autograd.grad(loss.sum(), leaves) for loss in (old, new))
        torch.testing.assert_close(after, before)


def test_there_are_blocks() -> None:
    text = README.read_text(encoding="utf-8")
    assert BLOCKS
    assert len(BLOCKS) >= text.count("```python"), "a block of Python is not found"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs(block: Block) -> None:
    torch.manual_seed(0)
    pairs = _run(block)
    assert pairs == len(re.findall(r"^new = ", block.code, re.MULTILINE))


def test_named_tests_exist() -> None:
    """Those that show what the README says of compatibility, and of the rest."""
    named = set(re.findall(r"\btest_\w+\.py", README.read_text(encoding="utf-8")))
    assert len(named) > 20
    assert named <= {path.name for path in Path(__file__).parent.iterdir()}


def test_extraction() -> None:
    text = "\n".join(
        [
            "```python",
            "a = 1",
            "```",
            "- in a list",
            "  ```py title='x'",
            "  if True:",
            "      b = '~~~'",
            "  ```",
            "~~~~Python",
            "```",
            "~~~~",
            "```",
            "shell",
            "```",
            "```bash",
            "python",
            "```",
        ]
    )
    assert [(block.line, block.code) for block in python_blocks(text)] == [
        (2, "a = 1"),
        (6, "if True:\n    b = '~~~'"),
        (10, "```"),
    ]
    with pytest.raises(ValueError, match="line 2 does not end"):
        python_blocks("text\n```python\na = 1\n")


@pytest.mark.parametrize("new", ["a + 1", "a.detach() + 0 * a"], ids=["loss", "gradient"])
def test_a_wrong_pair_is_found(new: str) -> None:
    start = "import torch\na = torch.ones(1, requires_grad=True)\nold = 1 * a\n"
    assert _run(Block(1, f"{start}new = a * 1")) == 1
    with pytest.raises(AssertionError):
        _run(Block(1, f"{start}new = {new}"))
