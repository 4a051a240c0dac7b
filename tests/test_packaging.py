"""What an installation holds: as a wheel the package alone, in editable mode a plain path.

The tests of both need an installation of that kind, which `.ci/run` makes.
"""

import json
import re
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import pytest

import fused_smoothl1

ROOT = Path(__file__).parent.parent
# (An egg-info, which setuptools left in older checkouts, has no RECORD.)
INSTALLED = [d for d in distributions(name="fused_smoothl1") if d.read_text("RECORD")]


def _origin(installed: Distribution) -> Any:
    return json.loads(installed.read_text("direct_url.json") or "{}")


def test_editable_installation_is_a_plain_path() -> None:
    """A type checker reads a path, but does not run an import hook."""
    origin = {"dir_info": {"editable": True}, "url": ROOT.as_uri()}
    found = [installed for installed in INSTALLED if _origin(installed) == origin]
    if not found:
        pytest.skip("this checkout is not installed in editable mode")
    (pth,) = [path for path in found[0].files or () if path.suffix == ".pth"]
    assert pth.read_text().splitlines() == [str(ROOT)]


def test_wheel_is_the_package_alone() -> None:
    package = Path(fused_smoothl1.__file__).parent
    found = [d for d in INSTALLED if package == Path(str(d.locate_file(package.name)))]
    if not found:
        pytest.skip("the tests do not run on an installed wheel")
    files = found[0].files or []
    folders = {path.parts[0] for path in files}
    assert folders == {package.name, f"{package.name}-{fused_smoothl1.__version__}.dist-info"}
    assert f"{package.name}/py.typed" in map(str, files)


def test_newest_release_of_the_changelog_is_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.findall(r"^## \[(.+)\] - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    assert dated[:1] == [fused_smoothl1.__version__]
