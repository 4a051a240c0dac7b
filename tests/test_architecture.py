"""What CONTRIBUTING says of the package's architecture is true of the code."""

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path.read_text() for path in (ROOT / "fused_smoothl1").glob("[!_]*.py")}
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
ANYWHERE = {"problem", "hooks"}


def _imports(source: str) -> set[str]:
    """Return the files of the package that a file loads, be it by name while it runs."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "fused_smoothl1":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.removeprefix("fused_smoothl1."))
        elif isinstance(node, ast.Constant) and str(node.value).startswith("fused_smoothl1."):
            names.add(str(node.value).removeprefix("fused_smoothl1."))
    return names & set(FILES)


def _drawn() -> set[tuple[str, str]]:
    """Return the arrows of the picture."""
    arrows: set[tuple[str, str]] = set()
    for line in re.findall(r"^ +(\w+ -->.*)$", TEXT, re.MULTILINE):
        nodes = [part.split(" & ") for part in line.split(" --> ")]
        for tails, heads in itertools.pairwise(nodes):
            arrows |= {(tail, head) for tail in tails for head in heads}
    return arrows


def test_picture_of_the_imports() -> None:
    imports = {(name, other) for name, source in FILES.items() for other in _imports(source)}
    assert _drawn() == {arrow for arrow in imports if arrow[1] not in ANYWHERE}
    without = {"module", "kernel", "layout", *ANYWHERE}
    assert {name for name, other in imports if other in ANYWHERE} - ANYWHERE == {*FILES} - without


def test_imports_run_down_the_list() -> None:
    order = re.findall(r"^\| `(\w+)\.py`", TEXT, re.MULTILINE)
    assert sorted(order) == sorted(FILES)
    for name, source in FILES.items():
        assert all(order.index(other) > order.index(name) for other in _imports(source))


def test_private_names_of_pytorch_stand_in_one_file() -> None:
    """But for torch._check, which PyTorch documents."""
    names = r"\btorch(?:\.\w+)*\._(?!check\b)\w+"
    for name, source in FILES.items():
        assert bool(re.findall(names, source)) == (name == "hooks"), name
