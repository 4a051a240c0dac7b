"""What CONTRIBUTING says of the package's architecture is true of the code."""

import ast
import re
from itertools import pairwise, product

from tests.support import ROOT

FILES = {path.stem: path.read_text() for path in (ROOT / "fused_smoothl1").glob("[!_]*.py")}
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def loaded_by(source: str) -> set[str]:
    """Return the files of the package that a file loads, be it by name while it runs."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant):
            names.add(str(node.value))
    return {name for name in FILES if f"fused_smoothl1.{name}" in names}


ARROWS = {(name, other) for name, source in FILES.items() for other in loaded_by(source)}


def test_picture_of_the_imports() -> None:
    anywhere, drawn = {"problem", "hooks"}, set()
    for line in re.findall(r"^ +(\w+ -->.*)$", TEXT, re.MULTILINE):
        for tails, heads in pairwise(line.split(" --> ")):
            drawn |= {*product(tails.split(" & "), heads.split(" & "))}
    assert drawn == {arrow for arrow in ARROWS if arrow[1] not in anywhere}
    into_them = {name for name, other in ARROWS if other in anywhere} - anywhere
    assert into_them == FILES.keys() - anywhere - {"module", "kernel", "layout"}


def test_imports_run_down_the_list() -> None:
    order = re.findall(r"^\| `(\w+)\.py`", TEXT, re.MULTILINE)
    assert sorted(order) == sorted(FILES)
    assert all(order.index(name) < order.index(other) for name, other in ARROWS)


def test_private_names_of_pytorch_stand_in_one_file() -> None:
    """But for torch._check, which PyTorch documents."""
    private = re.compile(r"\btorch(?:\.\w+)*\._(?!check\b)\w+")
    assert [name for name, source in FILES.items() if private.search(source)] == ["hooks"]
